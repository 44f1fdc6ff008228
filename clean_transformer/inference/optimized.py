"""`optimize`: makes the blocks and the unembedding of a model faster for inference."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from clean_transformer.inference.fast_modules import (
    FAST,
    SUPPORTED,
    CompiledStep,
    FastBlock,
    FastUnembed,
)
from clean_transformer.inference.matmuls import ThroughFloat32
from clean_transformer.kv_cache import KVCache, StaticKVCache
from clean_transformer.support.interrupts import Undoable
from clean_transformer.support.stand_in import StandIn, reassigned, stand_ins
from clean_transformer.support.validation import refuse_other


class Speedup(StandIn):
    """A fast replacement of a method, made by `optimize`. A second `optimize` removes it."""


class SlowDtype(UserWarning):
    """Warns that this processor reads prompts faster in float32 than in the model's dtype."""


class Optimized(Undoable["Optimized"]):
    """Lets you undo `optimize`: call `undo()`, or use this object in a `with` statement.

    At the end of the `with` block, `undo()` is called. `modules` holds the paths of the modules
    that `optimize` made faster. All other modules of the model run as before.
    """

    def __init__(
        self,
        model: nn.Module,
        fast: dict[str, FastBlock | FastUnembed],
        others: Iterable[tuple[str, Callable[[Any], Any]]],
    ):
        self.modules = tuple(fast)
        self._model, self._fast, self._others = model, fast, others
        self._speedups: list[Speedup] = []
        super().__init__(Optimized.undo)

    def make(self) -> None:
        """Undo earlier calls of `optimize` for the model, and put the fast methods in place."""
        for module in self._model.modules():
            for stand_in in stand_ins(module):
                if isinstance(stand_in, Speedup):
                    stand_in.restore()
        for each in self._fast.values():
            self._speedups.append(Speedup(each.module, "forward", each.over))
        for name, over in self._others:
            self._speedups.append(Speedup(self._model, name, over))

    def unmake(self) -> None:
        """Let the modules run the slower methods from before `optimize` again."""
        for speedup in self._speedups:
            speedup.restore()

    def undo(self) -> None:
        """Let the modules run the slower methods from before `optimize` again.

        A second call does nothing. The parameters keep the memory order that `optimize` gave them,
        which changes neither their values nor their shapes.
        """
        self.end()

    def __repr__(self) -> str:
        kernels = sorted({type(each.kernel).__name__ for each in self._fast.values()})
        return f"Optimized({len(self.modules)} modules; kernels: {', '.join(kernels)})"


def optimize(
    model: nn.Module, weights: Literal["int8"] | None = None, *, compile: bool = False
) -> Optimized:
    """Make the blocks and the unembedding of `model` faster for inference.

    A block does not change if it contains a module of a class that `optimize` does not know, such
    as a variant of attention, or if other code has replaced the block's `forward`. The names,
    shapes and values of all parameters stay the same. An optimized module runs the slower `forward`
    from before `optimize` while a submodule has a hook or a patched method, while gradients are
    enabled, under autocast, and after one of its submodules or weights was
    replaced. The warning `NotOptimized` then says why. A second call of `optimize` first undoes the
    earlier call. On a processor without instructions for the model's bfloat16 or float16, the
    warning `SlowDtype` advises float32.

    With `weights="int8"`, which works only on the CPU, the modules compute with 8-bit copies of the
    weights. The modules then read fewer bytes from memory, and their outputs are less accurate.

    With `compile`, `generate` and `stream` run the forward pass for each new token as one graph of
    `torch.compile`. Beam search runs without this graph. On CUDA, this is a CUDA graph. Each
    combination of a batch size and a length of the KV cache (rounded up to a multiple of 256) has
    its own graph. Compiling one graph takes up to a minute.

    Raises `ValueError` for any other `weights` than "int8" and None, and for 8-bit weights on a
    device other than the CPU. Raises `ValueError` for 8-bit weights of a model that was made under
    `torch.inference_mode()`. The parameters of such a model have no version counters, so `optimize`
    could not notice later changes of the parameters. Raises `TypeError` for `compile` with a model
    other than `DemoTransformer`.
    """
    if compile and not hasattr(model, "read_one"):
        raise TypeError(
            f"a {type(model).__name__} has no decoding step to compile; give a DemoTransformer, or "
            "leave out compile=True"
        )
    refuse_other("weights", weights, "int8", None)
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
    supported = {
        path: (module, FAST[type(module)])
        for path, module in model.named_modules()
        if type(module) in FAST
        and all(type(m) in SUPPORTED for m in [*module.modules()][1:])
        and not reassigned(module, "forward")
    }
    # Parameters whose memory was laid out anew under torch.inference_mode could not be trained.
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        fast = {path: kind(module, weights) for path, (module, kind) in supported.items()}
    if any(type(each.kernel) is ThroughFloat32 for each in fast.values()):
        warnings.warn(
            f"this processor has no instructions for {parameter.dtype}, so prompts run faster in "
            "float32; load the model with dtype=torch.float32 if it fits in memory",
            SlowDtype,
            stacklevel=3,
        )
    others: list[tuple[str, Callable[[Any], Any]]] = []
    if compile:
        step = CompiledStep(model, weights)
        others = [("read_one", step.over), ("cache_class", use_static_cache)]
    return Optimized(model, fast, others).begin()


def use_static_cache(below: type[KVCache]) -> type[KVCache]:
    """Return `StaticKVCache`, the cache class for compiled graphs, to use instead of `below`."""
    return StaticKVCache
