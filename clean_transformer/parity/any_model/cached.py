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
# correct bits. This is chosen. Rounding leaves more correct bits, and a wrong cache, mask or
# position leaves fewer.
HEALTHY_POWER = 1 / 3


class LastPositions(AbstractContextManager["LastPositions"]):
    """Inside a `with` block, stores the outputs of modules at the last position.

    `names` maps each module to its path. `outputs` maps the path to the module's outputs [batch d],
    one for each call. The paths are in the order in which the first calls end. Outputs that are not
    [batch pos d], with the given `batch`, are left out.
    """

    def __init__(self, names: Mapping[nn.Module, str], batch: int):
        self.names, self.batch = names, batch
        self.outputs: dict[str, list[Tensor]] = {}

    def __enter__(self) -> "LastPositions":
        self.handle = register_module_forward_hook(self._store)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _store(self, module: nn.Module, args: Any, output: Any) -> None:
        found = tensors_in(output)
        if module not in self.names or not found or not found[0].is_floating_point():
            return
        if found[0].ndim == 3 and len(found[0]) == self.batch:
            with trusted():
                last = found[0][:, -1].detach().cpu().double()
            self.outputs.setdefault(self.names[module], []).append(last)


def compare_cached(
    model: nn.Module, prompt: Tensor, generated: Any, during: LastPositions, u: float
) -> Check:
    """Compare the outputs of modules while the model generated text with those for the text alone.

    `prompt` [batch pos] are the token ids before the new ones. `generated` is what `generate`
    returned: token ids [batch pos] that begin with the prompt. `during` has the outputs of the
    modules while `generate` ran. `u` is the unit roundoff of the model's least accurate dtype.

    The verdict is that of the output that the model computes last, such as the logits. Its
    difference is divided by its standard deviation over the last axis. The note names the first
    module whose outputs differ. The verdict is NOT CHECKED if the calls of `generate` cannot be
    compared, for example because it does not call the model once for each new token.
    """
    start = prompt.shape[1]
    if not isinstance(generated, Tensor) or not torch.equal(generated[:, :start], prompt):
        return _not_checked("generate does not return token ids that begin with the prompt")
    n_new, allowed, largest = generated.shape[1] - start, u**HEALTHY_POWER, 0.0
    for step in range(n_new):
        alone = LastPositions(during.names, during.batch)
        try:
            with torch.no_grad(), uncompiled(), alone:
                model(generated[:, : start + step])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return _not_checked(f"the model cannot read the generated text: {reason}")
        differences = {
            path: _difference(during.outputs[path][step], found[0])
            for path, found in alone.outputs.items()
            if len(found) == 1 and len(during.outputs.get(path, [])) == n_new
        }
        if not differences:
            break
        largest = max(largest, [*differences.values()][-1])
        if largest > allowed:
            first = next(path for path, each in differences.items() if each > allowed)
            note = f"token {step + 1} of {n_new}; the first output that differs is that of {first}"
            return Check(NAME, Verdict.WRONG, largest, allowed, note)
    else:
        if n_new:
            return Check(NAME, Verdict.PASS, largest, allowed)
    return _not_checked("generate does not call the model once for each new token")


def _not_checked(reason: str) -> Check:
    return Check(NAME, Verdict.NOT_CHECKED, note=f"{NAME} were not compared: {reason}")


def _difference(one: Tensor, other: Tensor) -> float:
    """Return the largest RMS difference of two rows [batch d], in standard deviations of a row.

    A number that is added to a whole row of logits does not change the probabilities, so the mean
    of the difference is left out.
    """
    if one.shape != other.shape:
        return torch.inf
    difference = (one - other).std(dim=-1, correction=0)
    relative = torch.where(difference == 0, 0.0, difference / other.std(dim=-1, correction=0))
    return float(relative.nan_to_num(torch.inf, torch.inf).max())


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
