"""Repeats a wrong call with other memory layouts and with simpler operations, to find the cause."""

from copy import copy
from dataclasses import astuple, dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from clean_transformer.parity.operations.attention import ATTENTIONS
from clean_transformer.parity.operations.bounds import expected_outputs
from clean_transformer.parity.operations.call import Call, Numbers, Operand, lay_out, sample
from clean_transformer.parity.operations.judgment import Judgment, is_right, judge
from clean_transformer.parity.operations.replay import (
    Call64,
    Expected,
    named_arguments,
    operation_name,
    run_call,
)
from clean_transformer.parity.operations.unfused import UNFUSED
from clean_transformer.parity.oracle import UNIT_ROUNDOFF, smallest_kept, trusted
from clean_transformer.parity.verdict import Verdict
from clean_transformer.reports.environment import float32_precision, full_float32_precision


class Cause(Enum):
    """Why a call is wrong, as found by repeating the call.

    TF32 or BFLOAT16: the error is as large as if the call were computed in TF32 or bfloat16.
    FIRST_CALL: the same call is right when it is repeated. LAYOUT: the call is right when all its
    tensors are contiguous. COMPILED: the call runs compiled code. VALUES: none of the
    other causes was found.
    """

    TF32 = "TF32"
    BFLOAT16 = "bfloat16"
    FIRST_CALL = "first call"
    LAYOUT = "layout"
    COMPILED = "compiled"
    VALUES = "values"


@dataclass(frozen=True)
class Finding:
    """A description of a call whose error is too large for a healthy device.

    `call` describes the call, and `func` is the ATen operation. `arguments` and `keywords` are the
    call's positional and keyword arguments, with an `Operand` in place of each tensor. `numbers`
    has statistics of the values of each tensor, in the order of `call.operands`. `judgment` holds
    the verdict and the error. `on_random` is the judgment of the same call on random numbers, as in
    the script that `reproduction_script` writes. If the call is right on these numbers, or cannot
    be checked, `on_random` is None. `cause` is the cause of the error, and `diagnosis` describes
    the cause in words.
    """

    call: Call
    func: Any = field(repr=False)
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    numbers: tuple[Numbers, ...]
    judgment: Judgment
    on_random: Judgment | None
    cause: Cause
    diagnosis: str

    @property
    def ratio(self) -> float:
        """The largest error of all elements, in units of one rounding error; see `Judgment`."""
        return self.judgment.ratio

    @property
    def bits(self) -> float:
        """The number of correct bits of the result (see `Judgment`)."""
        return self.judgment.bits

    @property
    def verdict(self) -> Verdict:
        """The verdict on the call: WRONG or DEGRADED."""
        return self.judgment.verdict


class Attempt:
    """A call of an ATen operation that can be repeated.

    Creating an `Attempt` copies the values of all tensor arguments to the CPU. Create it before you
    run the call, because an in-place operation overwrites its inputs.
    """

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
                # `copy=True`, because an in-place operation on the CPU overwrites its inputs.
                copy = self.leaves[place].detach().to("cpu", copy=True)
                self.leaves[place] = copy.contiguous()

    def expect(self, output: Any) -> list[Expected | None] | None:
        """Return the exact value and the allowed error of each output, from `expected_outputs`.

        `output` is what the device returned. The list has None for an output that is not compared.
        The result is None instead of a list if no output can be compared, or if an output is
        complex.
        """
        leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if any(leaf.is_complex() for leaf in leaves):
            return None
        dtype = first_float(output) or torch.int64
        with trusted():
            args, kwargs = tree_unflatten(self.leaves, self.form)
            expected = expected_outputs(Call64(self.func, args, kwargs, dtype))
        return expected if expected is not None and any(expected) else None

    def check(self, output: Any) -> tuple[list[Expected | None] | None, Judgment | None]:
        """Return the result of `expect` and the judgment of `output`, or (None, None).

        `output` is what the device returned. Some devices, such as xla, read numbers below the
        underflow threshold as 0. So `output` is right, too, if it is right for the inputs in which
        these numbers are 0.
        """
        expected = self.expect(output)
        if expected is None:
            return None, None
        judgment = judge(expected, output)
        flushed = None if is_right(judgment) else self._with_flushed_inputs().expect(output)
        if flushed is not None and is_right(again := judge(flushed, output)):
            return flushed, again
        return expected, judgment

    def _with_flushed_inputs(self) -> "Attempt":
        other = copy(self)
        with trusted():
            other.leaves = [
                leaf.masked_fill(leaf.abs() < smallest_kept(leaf.dtype), 0.0)
                if isinstance(leaf, Tensor) and leaf.dtype in UNIT_ROUNDOFF
                else leaf
                for leaf in self.leaves
            ]
        return other

    def with_layouts(self, layouts: dict[int, Operand]) -> tuple[Any, dict[str, Any]]:
        """Return the call's positional and keyword arguments, with its tensors in given layouts.

        `layouts` has these memory layouts. Its keys are indices into `self.leaves`, the flat list
        of all arguments. The tensors have the values from before the call, and are on the devices
        of the original call.
        """
        leaves = [*self.leaves]
        for place, layout in layouts.items():
            with trusted():
                leaves[place] = lay_out(self.leaves[place], layout, self.devices[place])
        return tree_unflatten(leaves, self.form)

    def retry(self, expected: list[Expected | None], layouts: dict[int, Operand]) -> Judgment:
        """Repeat the call on the same values in the memory layouts `layouts`, and judge the result.

        `expected` has the exact outputs. The keys of `layouts` are indices into `self.leaves`, the
        flat list of all arguments.
        """
        args, kwargs = self.with_layouts(layouts)
        return judge(expected, run_call(self.func, args, kwargs))

    def diagnose(self, expected: list[Expected | None], judgment: Judgment) -> Finding:
        """Repeat the call with other memory layouts and simpler operations, and describe the error.

        `expected` has the exact value and the allowed error of each output. `judgment` is the
        judgment of the original call.
        """
        plain = {place: layout.contiguous() for place, layout in self.layouts.items()}
        repeated = self.retry(expected, self.layouts)
        contiguous = self.retry(expected, plain) if plain != self.layouts else None
        unfused = self.retry_unfused(expected)
        args, kwargs = tree_unflatten(
            [self.layouts.get(place, leaf) for place, leaf in enumerate(self.leaves)], self.form
        )
        # PyTorch tags attention as random because of dropout. We do not compare calls with dropout.
        draws = torch.Tag.nondeterministic_seeded in self.func.tags
        draws = draws and self.call.name not in ATTENTIONS
        if judgment.precision:
            cause = Cause(judgment.precision)
            conclusions = [f"computed in {cause.value} precision{self.lowered_by(expected)}"]
        elif draws:  # one right draw does not show that the next draw is right
            cause, conclusions = Cause.VALUES, []
        elif is_right(repeated):
            cause = Cause.FIRST_CALL
            conclusions = ["wrong the first time, right when the same call is repeated"]
        elif is_right(contiguous):
            cause = Cause.LAYOUT
            conclusions = [f"wrong only when {self.guilty_layout(expected)}"]
        else:
            cause, conclusions = Cause.VALUES, []
        if is_right(unfused):
            conclusions.append("right in its unfused form")
        tried = "wrong in some of the draws" if is_right(repeated) else "wrong in every form tried"
        return Finding(
            call=self.call,
            func=self.func,
            arguments=args,
            keywords=kwargs,
            numbers=tuple(Numbers.of(self.leaves[place]) for place in self.layouts),
            judgment=judgment,
            on_random=self.judge_on_random_numbers(),
            cause=cause,
            diagnosis="; ".join(conclusions) or tried,
        )

    def judge_on_random_numbers(self) -> Judgment | None:
        """Judge the same call on the random numbers that a reproduction script uses.

        Returns None if the call is right on these numbers, or if it cannot be checked.
        """
        drawn = self.with_random_numbers()
        args, kwargs = drawn.with_layouts(drawn.layouts)
        try:
            _, found = drawn.check(run_call(self.func, args, kwargs))
        except RuntimeError:  # for example, all weights to sample from are 0
            return None
        return None if is_right(found) else found

    def with_random_numbers(self) -> "Attempt":
        """Return an `Attempt` of the same call on the random numbers of a reproduction script."""
        other = copy(self)
        other.leaves = [*self.leaves]
        with trusted(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for place, layout in self.layouts.items():
                numbers = astuple(Numbers.of(self.leaves[place]))
                in_memory = (layout.shape, layout.stride, layout.storage_offset)
                values = sample("cpu", layout.dtype, *in_memory, *numbers)
                other.leaves[place] = values.contiguous()
        return other

    def lowered_by(self, expected: list[Expected | None]) -> str:
        """Return words that name the setting that lowers the precision of float32 products.

        The setting is one of PyTorch's, or an environment variable. If none is found, return "".
        """
        device_type = next(iter(self.devices.values())).type
        with full_float32_precision(device_type):
            without = self.retry(expected, self.layouts)
        # A setting of PyTorch is named only if the call is right without this setting. An
        # environment variable cannot be changed while the program runs. So it is named if it is
        # set, and if the call stays wrong without PyTorch's settings.
        settings = float32_precision(device_type)
        for name, value in settings.items():
            if name.startswith("torch.") and is_right(without):
                return f", because {name} is {value!r}"
            if not name.startswith("torch.") and not is_right(without):
                return f"; the environment has {name}={value}"
        return ""

    def retry_unfused(self, expected: list[Expected | None]) -> Judgment | None:
        """Compute the first output with several simple operations on the device, and judge it.

        Returns None if the table UNFUSED has no simple operations for this operation.
        """
        unfused = UNFUSED.get(operation_name(self.func))
        if unfused is None:
            return None
        named = named_arguments(self.func, *self.with_layouts(self.layouts))
        return judge(expected[:1], unfused(named))

    def guilty_layout(self, expected: list[Expected | None]) -> str:
        """Say in words which argument's memory layout makes the call wrong.

        For each argument in turn, the call is repeated with a changed layout of only this argument.
        The search ends at the first repeated call that is right.
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


def first_float(output: Any) -> torch.dtype | None:
    """The dtype of the first floating-point tensor in a call's output; None if there is none."""
    leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return next((leaf.dtype for leaf in leaves if leaf.is_floating_point()), None)
