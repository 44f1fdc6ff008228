"""Question 3: which operation goes wrong first? Every ATen call beside its float64 replay."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from clean_transformer.parity.operations.bounds import WITHOUT_VALUES, expected_outputs
from clean_transformer.parity.operations.call import Call, Operand
from clean_transformer.parity.operations.judgment import (
    Judgment,
    _contiguous,
    _range,
    _right,
    judge,
)
from clean_transformer.parity.operations.known_issues import match
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
    """A call that broke its bound, what was tried, and what was concluded.

    `arguments` and `keywords` are the call's with an `Operand` for each tensor, whose smallest and
    largest values are in `ranges`, in the order of `call.operands`. The ratios are those of trying
    the same values once more: as they were, in contiguous memory without a storage offset, and in
    the unfused form; `None` where that is not different or does not exist.
    """

    call: Call
    func: Any = field(repr=False)
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    ranges: tuple[tuple[float, float], ...]
    index: int
    judgment: Judgment
    repeat_ratio: float
    contiguous_ratio: float | None
    unfused_ratio: float | None
    diagnosis: str
    known: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """The largest error in units of its bound's u G."""
        return self.judgment.ratio

    @property
    def bits(self) -> float:
        """The effective precision."""
        return self.judgment.bits

    @property
    def verdict(self) -> Verdict:
        """WRONG, or DEGRADED for a lower precision or more than the healthy ratio."""
        return self.judgment.verdict


@dataclass
class OperationsReport:
    """What a run under the check saw; it ends at the first WRONG operation.

    `seen` counts every call that has values, `not_checked` those that could not be compared, both
    by the operation's name; `largest` is the largest ratio of each.
    """

    seen: Counter[str] = field(default_factory=Counter)
    not_checked: Counter[str] = field(default_factory=Counter)
    largest: dict[str, float] = field(default_factory=dict)
    finding: Finding | None = None

    @property
    def compared(self) -> Counter[str]:
        """How many calls were compared, by name."""
        return self.seen - self.not_checked

    @property
    def verdict(self) -> Verdict:
        """The finding's; PASS only if there is none and every call was compared."""
        if self.finding is not None:
            return self.finding.verdict
        return Verdict.NOT_CHECKED if self.not_checked or not self.seen else Verdict.PASS


class _FirstWrong(Exception):
    """Ends the run."""


def check_operations(
    function: Callable[..., Any], *inputs: Any, **arguments: Any
) -> OperationsReport:
    """Run the function, without gradients, and compare every ATen operation that it calls."""
    checker = _Checker()
    # Under inference mode a dispatch mode would see whole compositions instead of kernels.
    with torch.inference_mode(False), torch.no_grad():
        try:
            with checker:
                function(*inputs, **arguments)
        except _FirstWrong:
            pass
    return checker.report


def first_wrong_operation(
    function: Callable[..., Any], *inputs: Any, **arguments: Any
) -> Finding | None:
    """The first WRONG operation of that run; without one, the first DEGRADED; else `None`.

    `None` says that nothing that could be compared was found wrong: `check_operations` tells what
    was compared.
    """
    return check_operations(function, *inputs, **arguments).finding


class _Checker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compares each call on its way; whatever mode is below, it too sees every call and retry."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.report = OperationsReport()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = (args, kwargs or {})
        name = operation_name(func)
        if name in WITHOUT_VALUES:
            return func(*args, **given[1])
        attempt = _Attempt(func, *given)
        output = func(*args, **given[1])
        self.report.seen[name] += 1
        expected = attempt.expect(output)
        if expected is None:
            self.report.not_checked[name] += 1
            return output
        judgment = judge(expected, output)
        self.report.largest[name] = max(self.report.largest.get(name, 0.0), judgment.ratio)
        if judgment.verdict is Verdict.WRONG or (
            judgment.verdict is Verdict.DEGRADED and self.report.finding is None
        ):
            index = sum(self.report.seen.values()) - 1
            self.report.finding = attempt.diagnose(expected, judgment, index)
        if judgment.verdict is Verdict.WRONG:
            raise _FirstWrong
        return output


class _Attempt:
    """A call's inputs, kept on the CPU from before it ran, to be tried again in other layouts."""

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
                # A copy: the call may write into its arguments.
                copy = self.leaves[place].detach().to("cpu", copy=True)
                self.leaves[place] = copy.contiguous()

    def expect(self, output: Any) -> list[Expected | None] | None:
        """What each output must be; `None` for a call that cannot be checked."""
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
        """The arguments on the device, with the values from before the call."""
        leaves = [*self.leaves]
        for place, layout in layouts.items():
            with trusted():
                leaves[place] = lay_out(self.leaves[place], layout, self.devices[place])
        return tree_unflatten(leaves, self.form)

    def retry(self, expected: list[Expected | None], layouts: dict[int, Operand]) -> Judgment:
        """The same call with the same values, laid out like that."""
        args, kwargs = self.with_layouts(layouts)
        return judge(expected, self.func(*args, **kwargs))

    def diagnose(self, expected: list[Expected | None], judgment: Judgment, index: int) -> Finding:
        """Try the call again, in other ways, and conclude."""
        plain = {place: _contiguous(layout) for place, layout in self.layouts.items()}
        repeated = self.retry(expected, self.layouts)
        contiguous = self.retry(expected, plain) if plain != self.layouts else None
        unfused = self.retry_unfused(expected)
        args, kwargs = tree_unflatten(
            [self.layouts.get(place, leaf) for place, leaf in enumerate(self.leaves)], self.form
        )
        conclusions = []
        if judgment.precision:
            conclusions.append(f"computed in {judgment.precision} precision")
        elif _right(repeated):
            conclusions.append("wrong the first time, right when the same call is repeated")
        elif _right(contiguous):
            conclusions.append(f"wrong only when {self.guilty_layout(expected)}")
        if _right(unfused):
            conclusions.append("right in its unfused form")
        return Finding(
            call=self.call,
            func=self.func,
            arguments=args,
            keywords=kwargs,
            ranges=tuple(_range(self.leaves[place]) for place in self.layouts),
            index=index,
            judgment=judgment,
            repeat_ratio=repeated.ratio,
            contiguous_ratio=contiguous.ratio if contiguous else None,
            unfused_ratio=unfused.ratio if unfused else None,
            diagnosis="; ".join(conclusions) or "wrong in every form tried",
            known=tuple(fault.name for fault in match(self.call)),
        )

    def retry_unfused(self, expected: list[Expected | None]) -> Judgment | None:
        """The same on the device in small steps; the first output only."""
        unfused = UNFUSED.get(operation_name(self.func))
        if unfused is None:
            return None
        named = named_arguments(self.func, *self.with_layouts(self.layouts))
        return judge(expected[:1], unfused(named))

    def guilty_layout(self, expected: list[Expected | None]) -> str:
        """The one argument, and its property, without which the call is right."""
        names = [argument.name for argument in self.func._schema.arguments]
        keys = [*tree_unflatten([*range(len(self.leaves))], self.form)[0]]
        for place, layout in self.layouts.items():
            number = next((i for i, key in enumerate(keys) if place in tree_leaves(key)), None)
            who = f"argument {number + 1} ({names[number]})" if number is not None else "a keyword"
            at_start = Operand(layout.shape, layout.stride, 0, layout.dtype, layout.device)
            for property_, changed in (
                (f"has the storage offset {layout.storage_offset}", at_start),
                ("is not contiguous", _contiguous(layout)),
            ):
                if changed != layout and _right(
                    self.retry(expected, self.layouts | {place: changed})
                ):
                    return f"{who} {property_}"
        return "more than one argument is not contiguous"


def lay_out(values: Tensor, layout: Operand, device: torch.device | str) -> Tensor:
    """The values, which are on the CPU, on that device with that stride and storage offset."""
    length = layout.storage_offset + 1
    length += sum((n - 1) * step for n, step in zip(layout.shape, layout.stride, strict=True))
    # Behind an expanded tensor there are zeros, for a device that overlooks its strides.
    length = max(length, layout.storage_offset + values.numel())
    base = torch.zeros(length, dtype=values.dtype, device="cpu")
    places = torch.arange(base.numel(), device="cpu").as_strided(
        layout.shape, layout.stride, layout.storage_offset
    )
    base[places] = values
    return base.to(device).as_strided(layout.shape, layout.stride, layout.storage_offset)
