"""`optimize`: the same modules in fewer and faster steps, for inference."""

from contextlib import AbstractContextManager
from typing import Any, Literal

from torch import nn

from clean_transformer.inference.fast_modules import (
    FAST,
    SUPPORTED,
    CompiledStep,
    FastBlock,
    FastUnembed,
)
from clean_transformer.kv_cache import KVCache, StaticKVCache
from clean_transformer.support.stand_in import StandIn, stand_ins


class Speedup(StandIn):
    """A stand-in that `optimize` put in place, so that the next `optimize` finds it."""


class Optimized(AbstractContextManager["Optimized"]):
    """Modules that run faster, until `undo()` is called or the `with` block ends.

    `modules` are the paths of the faster ones. The other modules run as before.
    """

    def __init__(self, fast: dict[str, FastBlock | FastUnembed], step: list[Speedup]):
        self.modules = tuple(fast)
        self._fast = fast
        self._speedups = [Speedup(each.module, "forward", each.over) for each in fast.values()]
        self._speedups += step

    def undo(self) -> None:
        """Let the modules run their own methods again. A second call does nothing.

        The parameters keep their new order in memory. Their values and shapes never changed.
        """
        for speedup in self._speedups:
            speedup.restore()

    def __repr__(self) -> str:
        chosen = {
            type(each.module).__name__: {
                rows: type(kernel).__name__ for rows, kernel in each.choice.by_rows.items()
            }
            for each in self._fast.values()
        }
        return f"Optimized({len(self.modules)} modules; kernels by number of rows: {chosen})"

    def __exit__(self, *_: object) -> None:
        self.undo()


def optimize(
    model: nn.Module, weights: Literal["int8"] | None = None, *, compile: bool = False
) -> Optimized:
    """Make our blocks and unembeddings in a model faster, on its present device and in its dtype.

    Names, shapes and values of all parameters stay. A block runs its own `forward` instead while a
    submodule has a hook, while gradients are on, under autocast, and after one of its modules or
    weights was replaced; the warning `NotOptimized` says so once. On a CPU, some seconds go into
    measuring which kernels are the fastest. A second call replaces the first.

    `weights="int8"` computes with 8-bit copies of the weights, on the CPU only: that reads fewer
    bytes and is less accurate. With `compile`, `generate` runs each token after the prompt as one
    graph of `torch.compile`, on CUDA as a CUDA graph. Compiling takes up to a minute, once for
    every batch size and every 256 positions.

    Raises `ValueError` for 8-bit weights on another device than the CPU, and for 8-bit weights of a
    model that was made under `torch.inference_mode()`: its parameters do not count their changes,
    so that the copies could become outdated unnoticed. Raises `TypeError` for `compile` with a
    model other than `DemoTransformer`.
    """
    if compile and not hasattr(model, "read_one"):
        raise TypeError(
            f"a {type(model).__name__} has no decoding step to compile; give a DemoTransformer, or "
            "leave out compile=True"
        )
    parameter = next(model.parameters())
    if weights == "int8" and parameter.device.type != "cpu":
        raise ValueError(
            f"8-bit weights run on the cpu only, and the model is on {parameter.device}; use "
            "bfloat16 there"
        )
    if weights == "int8" and parameter.is_inference():
        raise ValueError(
            "8-bit weights are copies that must notice when a weight changes, and this model was "
            "made under torch.inference_mode(), which counts no changes; load it outside of that"
        )
    for module in model.modules():
        for stand_in in stand_ins(module):
            if isinstance(stand_in, Speedup):
                stand_in.restore()
    supported = {
        path: (module, FAST[type(module)])
        for path, module in model.named_modules()
        if type(module) in FAST and all(type(m) in SUPPORTED for m in [*module.modules()][1:])
    }
    fast = {path: kind(module, weights) for path, (module, kind) in supported.items()}
    step: list[Speedup] = []
    if compile:
        compiled = CompiledStep(model, weights)
        step = [
            Speedup(model, "read_one", compiled.over),
            Speedup(model, "cache_class", use_static_cache),
        ]
    return Optimized(fast, step)


def use_static_cache(below: type[KVCache]) -> Any:
    """Return the cache that a compiled step needs, in the place of the model's own."""
    return StaticKVCache
