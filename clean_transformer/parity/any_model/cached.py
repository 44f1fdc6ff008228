"""Compares what a model computes while it generates text with what it computes for the text alone.

While a model generates, it usually reads only the newest token, and takes the keys and values of
the earlier tokens from a cache. Its outputs must be those of a call with all tokens.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from clean_transformer.parity.oracle import trusted, uncompiled
from clean_transformer.parity.verdict import Check, Verdict

NAME = "outputs with and without a cache"
# The largest healthy difference is u to this power, where u is the unit roundoff: a third of the
# bits are correct. This is chosen. Rounding leaves more correct bits, and a wrong cache, mask or
# position leaves fewer.
HEALTHY_POWER = 1 / 3


class LastPositions(AbstractContextManager["LastPositions"]):
    """Inside a `with` block, stores the outputs of modules at the last position.

    `names` maps each module to its path. `outputs` maps the path to a list with an element for each
    call of the module: the tensors [batch d] at the last position, each with the number of
    positions that it had. The paths are in the order in which the first calls end. Outputs that are
    not floating-point tensors [batch pos d], with the given `batch`, are left out.
    """

    def __init__(self, names: Mapping[nn.Module, str], batch: int):
        self.names, self.batch = names, batch
        self.outputs: dict[str, list[list[tuple[int, Tensor]]]] = {}

    def __enter__(self) -> "LastPositions":
        self.handle = register_module_forward_hook(self._store)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _store(self, module: nn.Module, args: Any, output: Any) -> None:
        tensors = [
            each
            for each in tensors_in(output)
            if each.is_floating_point() and each.ndim == 3 and each.shape[0] == self.batch
        ]
        if module not in self.names or not tensors or any(each.shape[1] == 0 for each in tensors):
            return
        with trusted():
            last = [(each.shape[1], each[:, -1].detach().cpu().double()) for each in tensors]
        self.outputs.setdefault(self.names[module], []).append(last)


def compare_cached(
    model: nn.Module, prompt: Tensor, generated: Any, during: LastPositions, u: float
) -> Check:
    """Compare the outputs of modules while the model generated text with those for the text alone.

    `prompt` [batch pos] are the token ids before the new ones. `generated` is what `generate`
    returned: token ids [batch pos] that begin with the prompt. `during` has the outputs of the
    modules while `generate` ran. `u` is the unit roundoff of the model's least accurate dtype.

    The verdict is that of the module that ends last, whose output is the logits (see
    `_difference`). The note names the first module whose outputs differ. The verdict is NOT CHECKED
    if the calls of `generate` cannot be compared: if it does not call the model once for each new
    token, if it reads only a part of the text, or if the outputs for the prompt differ, for which
    no cache is read.
    """
    start, batch = prompt.shape[1], during.batch
    if not isinstance(generated, Tensor) or generated.ndim != 2 or len(generated) != batch:
        return _not_checked("generate does not return token ids [batch pos]")
    if not torch.equal(generated[:, :start].to(prompt.device), prompt):
        return _not_checked("generate does not return token ids that begin with the prompt")
    n_new, allowed, largest = generated.shape[1] - start, u**HEALTHY_POWER, 0.0
    compared = {path for path, calls in during.outputs.items() if len(calls) == n_new}
    for step in range(n_new):
        n_read, alone = start + step, LastPositions(during.names, batch)
        model.eval()  # `generate` may have turned on training mode
        try:
            with torch.no_grad(), uncompiled(), alone:
                model(generated[:, :n_read])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return _not_checked(f"the model cannot read the generated text: {reason}")
        paths = [path for path, calls in alone.outputs.items() if len(calls) == 1]
        paths = [path for path in paths if path in compared]
        if not paths:
            return _not_checked("generate does not call the model once for each new token")
        calls = {path: (during.outputs[path][step], alone.outputs[path][0]) for path in paths}
        if any(n not in (1, n_read) for n, _ in calls[paths[-1]][0]):
            return _not_checked("generate reads only a part of the text")
        differences = {path: _largest(*pair) for path, pair in calls.items()}
        largest = max(largest, differences[paths[-1]])
        if largest > allowed:
            if step == 0:
                return _not_checked("the outputs for the prompt differ, for which no cache is read")
            first = next(path for path in paths if differences[path] > allowed)
            note = f"token {step + 1} of {n_new}; the first output that differs is that of {first}"
            return Check(NAME, Verdict.WRONG, largest, allowed, note)
    if not n_new:
        return _not_checked("generate returns no new tokens")
    return Check(NAME, Verdict.PASS, largest, allowed)


def _not_checked(reason: str) -> Check:
    return Check(NAME, Verdict.NOT_CHECKED, note=f"{NAME} were not compared: {reason}")


def _largest(ours: list[tuple[int, Tensor]], theirs: list[tuple[int, Tensor]]) -> float:
    """Return the largest difference between two outputs of a module, each a list of tensors."""
    pairs = zip(ours, theirs, strict=False)
    return max(_difference(one, other) for (_, one), (_, other) in pairs)


def _difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two rows [batch d], relative to the spread of a row.

    The spread of a row is the median of its distances from its median, and so is its difference. So
    a masked logit of −1e9 hides nothing, and a number that is added to all logits of a row changes
    nothing. Numbers that are equal have the difference 0, also if they are not finite.
    """
    if one.shape != other.shape:
        return torch.inf
    is_equal = (one == other) | (one.isnan() & other.isnan())
    difference = torch.where(is_equal, 0.0, one - other)
    if not bool(difference.isfinite().all()):
        return torch.inf
    ratios = torch.where(is_equal.all(dim=-1), 0.0, _spread(difference) / _spread(other))
    return float(ratios.nan_to_num(0.0, torch.inf).max())


def _spread(rows: Tensor) -> Tensor:
    return (rows - rows.nanmedian(dim=-1, keepdim=True).values).abs().nanmedian(dim=-1).values


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in a model's inputs or output, including those in dataclasses."""
    leaves = tree_leaves(value)
    if leaves == [value]:
        if isinstance(value, Mapping):
            leaves = [*value.values()]
        elif is_dataclass(value):
            leaves = [getattr(value, each.name) for each in fields(value)]
        else:
            return leaves if isinstance(value, Tensor) else []
    return [tensor for leaf in leaves for tensor in tensors_in(leaf)]
