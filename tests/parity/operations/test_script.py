import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clean_transformer.parity.faults import inject
from clean_transformer.parity.faults.corruptions import Corruption, unmasked, with_result
from clean_transformer.parity.operations.check import first_wrong_operation
from clean_transformer.parity.operations.diagnosis import Attempt
from clean_transformer.parity.operations.script import reproduction_script
from clean_transformer.parity.oracle import UNIT_ROUNDOFF, trusted

from ..small import broken


def test_the_script_runs_by_itself(tmp_path: Path) -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    with inject("linear-noncontiguous-weight"):
        finding = first_wrong_operation(torch.mm, x, x.T)
    assert finding is not None
    path = tmp_path / "mm.py"
    path.write_text(reproduction_script(finding))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_script_keeps_dtype_layout_and_the_other_arguments() -> None:
    x = torch.randn(4, 9, 8, dtype=torch.bfloat16)[1:, 1:]
    with broken("add", with_result(lambda output: output + 3)):
        finding = first_wrong_operation(lambda: torch.add(x, x, alpha=2))
    assert finding is not None
    script = reproduction_script(finding)
    assert "sample('cpu', torch.bfloat16, (3, 8, 8), (72, 8, 1), 80," in script
    assert "torch.ops.aten.add.Tensor(x0, x1, alpha=2)" in script


# One operation of each kind of rule, with a result that is wrong by little more than its bound.
OPERATIONS = {
    "mm": (torch.mm, (9, 64), (64, 32)),
    "bmm": (torch.bmm, (2, 9, 64), (2, 64, 32)),
    "addmm": (torch.addmm, (32,), (9, 64), (64, 32)),
    "baddbmm": (partial(torch.baddbmm, beta=0.5, alpha=3.0), (2, 9, 9), (2, 9, 64), (2, 64, 9)),
    "add": (partial(torch.add, alpha=-2), (9, 64), (9, 64)),
    "mul": (torch.mul, (9, 64), (9, 64)),
    "exp": (torch.exp, (9, 64)),
    "tanh": (torch.tanh, (9, 64)),
    "sum": (partial(torch.sum, dim=-1), (9, 64)),
    "mean": (partial(torch.mean, dim=-1), (9, 64)),
    "_softmax": (partial(torch.softmax, dim=-1), (9, 65)),
    "_log_softmax": (partial(torch.log_softmax, dim=-1), (9, 65)),
    "gelu": (partial(F.gelu, approximate="tanh"), (9, 64)),
    "native_layer_norm": (lambda x, w, b: F.layer_norm(x, (64,), w, b), (9, 64), (64,), (64,)),
    "_scaled_dot_product_flash_attention_for_cpu": (
        partial(F.scaled_dot_product_attention, is_causal=True),
        *((1, 2, 9, 64),) * 3,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_tolerance_is_the_bound_of_the_finding(operation: str, dtype: torch.dtype) -> None:
    """The script fails for twice the healthy error, and passes for a healthy device."""
    function, *shapes = OPERATIONS[operation]
    generator = torch.Generator().manual_seed(0)
    tensors = [(5 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]

    def spoil(factor: float) -> Corruption:
        def corrupt(func, args, options):
            attempt = Attempt(func, args, options)
            output = func(*args, **options)
            with trusted():
                expected = attempt.expect(output)
                scale, healthy = expected[0].scale, expected[0].healthy
                u = UNIT_ROUNDOFF[dtype]
                moved = expected[0].exact + factor * healthy * u * scale
            moved = moved.to(dtype)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return corrupt

    with broken(operation, spoil(2.0)):
        finding = first_wrong_operation(function, *tensors)
    assert finding is not None
    assert finding.on_random is not None
    script = compile(reproduction_script(finding), operation, "exec")
    exec(script, {})
    if operation != "add":  # whose bound is the rounding of the spoilt result itself
        with broken(operation, spoil(0.5)):
            exec(script, {})
    with broken(operation, spoil(2.0)), pytest.raises(AssertionError, match="an error of"):
        exec(script, {})


def test_the_script_says_if_random_numbers_do_not_show_the_fault() -> None:
    def only_ones(output):
        return output + 1 if bool((output == 2).all()) else output

    with broken("add", with_result(only_ones)):
        finding = first_wrong_operation(torch.add, torch.ones(9), torch.ones(9))
        assert finding is not None
        assert finding.on_random is not None, "numbers that are all equal are drawn as they are"
        values = torch.tensor([1.0, -1.0, 1.0])
        with broken("mul", with_result(lambda y: y + 1 if float(y.sum()) == 3.0 else y)):
            finding = first_wrong_operation(torch.mul, values, values)
    assert finding is not None
    assert finding.on_random is None
    script = reproduction_script(finding)
    assert "These random numbers did not show it." in " ".join(script.split())
    exec(script, {})


def step_of_adamw() -> None:
    parameters = [torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    for parameter in parameters:
        parameter.requires_grad_().grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, fused=True).step()


def spoiled(func, args, options):
    func(*args, **options)
    args[0][-1].mul_(1.5)


# Calls whose arguments are lists of tensors that the operation overwrites.
OVERWRITING = {
    "_foreach_mul_": lambda: torch._foreach_mul_([torch.ones(4), torch.ones(5)], 3.0),
    "_fused_adamw_": step_of_adamw,
}


@pytest.mark.parametrize("operation", OVERWRITING)
def test_the_script_of_an_operation_that_returns_nothing_runs(operation: str) -> None:
    with broken(operation, spoiled):
        finding = first_wrong_operation(OVERWRITING[operation])
        assert finding is not None
        script = compile(reproduction_script(finding), operation, "exec")
        with pytest.raises(AssertionError, match="an error of"):
            exec(script, {})
    exec(script, {})


def test_the_script_of_a_draw_with_a_generator_runs() -> None:
    weights, generator = torch.rand(3, 9), torch.Generator()
    with inject("multinomial-int64-min"):
        finding = first_wrong_operation(
            lambda: torch.multinomial(weights, 2, True, generator=generator)
        )
        assert finding is not None
        script = compile(reproduction_script(finding), "multinomial", "exec")
        with pytest.raises(AssertionError, match="impossible indices"):
            exec(script, {})
    exec(script, {})


def test_a_mask_keeps_its_infinities() -> None:
    q = torch.randn(1, 2, 9, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    with broken("_scaled_dot_product_flash_attention_for_cpu", unmasked):
        attend = partial(F.scaled_dot_product_attention, attn_mask=mask)
        finding = first_wrong_operation(attend, q, q, q)
        assert finding is not None
        assert finding.on_random is not None
        script = reproduction_script(finding)
        with pytest.raises(AssertionError):
            exec(script, {})
    exec(script, {})
