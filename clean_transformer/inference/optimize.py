"""`optimize`: the same modules in fewer and faster steps, for inference."""

from contextlib import AbstractContextManager
from typing import Any, Literal

from torch import nn

from clean_transformer.inference.fast_modules import (
    FAST,
    WRITTEN_FOR,
    CompiledStep,
    Fast,
    FastBlock,
    FastUnembed,
)
from clean_transformer.kv_cache import StaticKVCache


class Optimized(AbstractContextManager["Optimized"]):
    """Modules that run faster, until `undo` or the end of a `with` block.

    `modules` are the paths of those that do; the others are of classes that it does not know.
    """

    def __init__(
        self, model: nn.Module, fast: dict[str, "FastBlock | FastUnembed"], step: dict[str, Any]
    ):
        self.modules = tuple(fast)
        self._fast = fast
        self._put = [(each.module, "forward", each) for each in fast.values()]
        self._put += [(model, name, value) for name, value in step.items()]
        for module, name, value in self._put:
            vars(module)[name] = value

    def undo(self) -> None:
        """Run the modules as they are written again. A second call does nothing.

        Their parameters keep the order in memory that they were given, which nothing else shows.
        """
        for module, name, value in self._put:
            if vars(module).get(name) is value:
                del vars(module)[name]

    def __repr__(self) -> str:
        chosen = {
            type(each.module).__name__: {
                rows: type(product).__name__ for rows, product in each.choice.by_rows.items()
            }
            for each in self._fast.values()
        }
        return f"Optimized({len(self.modules)} modules; products by number of rows: {chosen})"

    def __exit__(self, *_: object) -> None:
        self.undo()


def optimize(
    model: nn.Module, weights: Literal["int8"] | None = None, *, compile: bool = False
) -> Optimized:
    """Prepare our blocks and unembeddings in a model for inference, on its device, in its dtype.

    Names, shapes and values of all parameters stay, and so does all that can be watched: while
    somebody watches or patches inside a block, while gradients are on, and once a module or weight
    was replaced, that block runs as it is written, and `NotOptimized` says so, once. On a processor
    the products are the fastest of several, which takes some seconds to measure. "int8" computes
    with 8-bit copies of the weights: less to read, and less accurate. With `compile`, generation
    takes each token after the prompt through one graph of `torch.compile`, on CUDA through a CUDA
    graph. It takes up to a minute to make, once for every size of batch and every 256 positions.

    Raises `ValueError` for int8 weights on another device than the processor, or made under
    `torch.inference_mode()`, which counts no changes, so that the copies could not notice one;
    `TypeError` to compile another model than ours, which has another way to read a token.
    """
    if compile and not hasattr(model, "read_one"):
        raise TypeError(
            f"a {type(model).__name__} has no step to compile; compile a DemoTransformer"
        )
    parameter = next(model.parameters())
    if weights == "int8" and parameter.device.type != "cpu":
        raise ValueError(
            f"int8 weights are computed with on the cpu only, and the model is on "
            f"{parameter.device}; use bfloat16 there"
        )
    if weights == "int8" and parameter.is_inference():
        raise ValueError(
            "int8 weights are copies that must notice a change, and this model was made under "
            "torch.inference_mode(), which counts none; load it outside of that"
        )
    for module in model.modules():
        for name in ("forward", "read_one"):
            if isinstance(vars(module).get(name), Fast):  # of a call before this one
                delattr(module, name)
    vars(model).pop("cache_class", None)
    parts = {
        path: (module, FAST[type(module)])
        for path, module in model.named_modules()
        if type(module) in FAST and all(type(m) in WRITTEN_FOR for m in [*module.modules()][1:])
    }
    fast = {path: kind(module, weights) for path, (module, kind) in parts.items()}
    step: dict[str, Any] = {}
    if compile:
        step = {"read_one": CompiledStep(model, weights), "cache_class": StaticKVCache}
    return Optimized(model, fast, step)
