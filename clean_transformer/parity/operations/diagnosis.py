"""Repeats a wrong call in other layouts and forms, to find out when it is wrong."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from clean_transformer.parity.operations.bounds import expected_outputs
from clean_transformer.parity.operations.call import Call, Operand, lay_out
from clean_transformer.parity.operations.judgment import Judgment, is_right, judge
from clean_transformer.parity.operations.replay import (
    Call64,
    Expected,
    named_arguments,
    operation_name,
)
from clean_transformer.parity.operations.unfused import UNFUSED
from clean_transformer.parity.oracle import trusted
from clean_transformer.parity.verdict import Verdict


@dataclass(frozen=True)
class Finding:
    """A call whose error is above its healthy limit, and the diagnosis.

    `call` describes the call, and `func` is the operation. `arguments` and `keywords` are the
    call's positional and keyword arguments, with an `Operand` in place of each tensor. `ranges` has
    the smallest and the largest value of each tensor, in the order of `call.operands`. `judgment`
    holds the verdict and the error. The call was repeated with the same values: unchanged, with
    contiguous tensors, and in small steps. `diagnosis` says in words what these repetitions show.
    """

    call: Call
    func: Any = field(repr=False)
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    ranges: tuple[tuple[float, float], ...]
    judgment: Judgment
    diagnosis: str

    @property
    def ratio(self) -> float:
        """The largest error ratio, |device − exact| / (u G + η)."""
        return self.judgment.ratio

    @property
    def bits(self) -> float:
        """The effective precision in bits."""
        return self.judgment.bits

    @property
    def verdict(self) -> Verdict:
        """WRONG or DEGRADED."""
        return self.judgment.verdict


class Attempt:
    """A call that can be repeated. It holds CPU copies of the inputs, made before the call ran."""

    def __init__(self, func: Any, args: Any, kwargs: dict[str, Any]):
        self.func = func
        self.call = Call.of(func, args, kwargs)
        self.leaves, self.form = tree_flatten((tuple(args), kwargs))
        self.layouts = {
            place: Operand.of(leaf)
            for place, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor)
        }
        self.devices = {place: self.leaves[place].device for place in self.layouts}
        with trusted():
            for place in self.layouts:
                # Copy the inputs, because the call may write into them.
                copy = self.leaves[place].detach().to("cpu", copy=True)
                self.leaves[place] = copy.contiguous()

    def expect(self, output: Any) -> list[Expected | None] | None:
        """The exact value of each output, computed in float64; see `expected_outputs`.

        None if the call cannot be checked.
        """
        floats = [
            leaf.dtype
            for leaf in tree_leaves(output)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        dtype = floats[0] if floats else torch.int64
        with trusted():
            args, kwargs = tree_unflatten(self.leaves, self.form)
            expected = expected_outputs(Call64(self.func, args, kwargs, dtype))
        return expected if expected is not None and any(expected) else None

    def with_layouts(self, layouts: dict[int, Operand]) -> tuple[Any, dict[str, Any]]:
        """The call's arguments on the device, in these layouts, with the values before the call."""
        leaves = [*self.leaves]
        for place, layout in layouts.items():
            with trusted():
                leaves[place] = lay_out(self.leaves[place], layout, self.devices[place])
        return tree_unflatten(leaves, self.form)

    def retry(self, expected: list[Expected | None], layouts: dict[int, Operand]) -> Judgment:
        """Repeat the call with the same values in these layouts, and judge the result."""
        args, kwargs = self.with_layouts(layouts)
        return judge(expected, self.func(*args, **kwargs))

    def diagnose(self, expected: list[Expected | None], judgment: Judgment) -> Finding:
        """Repeat the call in other layouts and forms, and return the finding with a diagnosis."""
        plain = {place: layout.contiguous() for place, layout in self.layouts.items()}
        repeated = self.retry(expected, self.layouts)
        contiguous = self.retry(expected, plain) if plain != self.layouts else None
        unfused = self.retry_unfused(expected)
        args, kwargs = tree_unflatten(
            [self.layouts.get(place, leaf) for place, leaf in enumerate(self.leaves)], self.form
        )
        conclusions = []
        if judgment.precision:
            conclusions.append(f"computed in {judgment.precision} precision")
        elif is_right(repeated):
            conclusions.append("wrong the first time, right when the same call is repeated")
        elif is_right(contiguous):
            conclusions.append(f"wrong only when {self.guilty_layout(expected)}")
        if is_right(unfused):
            conclusions.append("right in its unfused form")
        return Finding(
            call=self.call,
            func=self.func,
            arguments=args,
            keywords=kwargs,
            ranges=tuple(value_range(self.leaves[place]) for place in self.layouts),
            judgment=judgment,
            diagnosis="; ".join(conclusions) or "wrong in every form tried",
        )

    def retry_unfused(self, expected: list[Expected | None]) -> Judgment | None:
        """Compute the first output in small steps on the device, and judge it.

        None if the operation has no unfused form.
        """
        unfused = UNFUSED.get(operation_name(self.func))
        if unfused is None:
            return None
        named = named_arguments(self.func, *self.with_layouts(self.layouts))
        return judge(expected[:1], unfused(named))

    def guilty_layout(self, expected: list[Expected | None]) -> str:
        """Say in words which argument's layout makes the call wrong.

        The call becomes right when only the layout of this argument is changed.
        """
        names = [argument.name for argument in self.func._schema.arguments]
        keys = [*tree_unflatten([*range(len(self.leaves))], self.form)[0]]
        for place, layout in self.layouts.items():
            number = next((i for i, key in enumerate(keys) if place in tree_leaves(key)), None)
            who = f"argument {number + 1} ({names[number]})" if number is not None else "a keyword"
            at_start = Operand(layout.shape, layout.stride, 0, layout.dtype, layout.device)
            for property_, changed in (
                (f"has the storage offset {layout.storage_offset}", at_start),
                ("is not contiguous", layout.contiguous()),
            ):
                if changed != layout and is_right(
                    self.retry(expected, self.layouts | {place: changed})
                ):
                    return f"{who} {property_}"
        return "more than one argument is not contiguous"


def value_range(values: Tensor) -> tuple[float, float]:
    """The smallest and the largest finite value; (0, 0) if there is no finite value."""
    finite = values[values.isfinite()]
    return (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
