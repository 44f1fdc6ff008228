"""The oracle's own LayerNorm, softmax and GELU: the fused kernels' values, without the kernels."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clean_transformer.parity import invariants
from clean_transformer.parity.elementary import FUNCTIONS
from clean_transformer.parity.oracle import trusted
from clean_transformer.parity.results import DeviceRun
from clean_transformer.parity.suite import check_device
from clean_transformer.parity.verdict import Verdict

from .small import F32, F64, everywhere, small_model, small_weights

GAIN, BIAS = torch.rand(2, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
CASES = {
    "layer norm": lambda x: F.layer_norm(x, (8,), GAIN, BIAS),
    "layer norm without gain": lambda x: F.layer_norm(x, (8,)),
    "layer norm over all axes": lambda x: F.layer_norm(x, (3, 8)),
    "softmax": lambda x: F.softmax(x, -1),
    "softmax over rows": lambda x: F.softmax(x, 0),
    "log softmax": lambda x: F.log_softmax(x, -1),
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    return y.detach(), torch.autograd.grad((y * weights).sum(), x)[0]


@pytest.mark.parametrize("name", CASES)
def test_they_are_the_fused_functions(name: str) -> None:
    x = 3 * torch.randn(3, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    wanted = with_gradient(CASES[name], x)
    with trusted():
        given = with_gradient(CASES[name], x)
    torch.testing.assert_close(given, wanted, rtol=1e-13, atol=1e-13)


def test_the_gradients_of_gain_and_bias() -> None:
    x = torch.randn(2, 3, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    gain, bias = GAIN.clone().requires_grad_(), BIAS.clone().requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.layer_norm(x, (8,), gain, bias).square().sum(), (gain, bias))

    wanted = gradients()
    with trusted():
        torch.testing.assert_close(gradients(), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("operation", FUNCTIONS)
def test_no_fused_kernel_runs_in_float64(operation: str) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError(f"{operation} ran")

    x = torch.randn(3, 8, dtype=F64)

    def run_all() -> None:
        for function in CASES.values():
            with_gradient(function, x)

    with everywhere(operation.removeprefix("aten::"), refuse):
        with trusted():
            run_all()
        with pytest.raises(AssertionError, match="ran"):
            run_all()


def unbiased(x, shape, weight, bias, eps):
    mean = x.mean(-1, keepdim=True)
    reciprocal = 1 / (x.var(-1, keepdim=True) + eps).sqrt()
    return (x - mean) * reciprocal * weight + bias, mean, reciprocal


def off_softmax(scores, dim, half_to_float):
    exp = (scores - scores.amax(dim, keepdim=True)).exp()
    return exp / exp.sum(dim, keepdim=True) * 1.001


def off_product(bias, x, weight, *, beta=1, alpha=1):
    return bias + 1.001 * torch.bmm(x[None], weight[None])[0]


WRONG_KERNELS = {
    "native_layer_norm": unbiased,
    "_softmax": off_softmax,
    "gelu": lambda x, *, approximate="none": 0.5 * x * (1 + (x / 2**0.5).erf()),
    "addmm": off_product,
    "mm": lambda x, weight: 1.001 * torch.bmm(x[None], weight[None])[0],
}
# What a new process imports at its start: the same wrong kernel, and a file that says so.
IN_NEW_PROCESSES = """
import pathlib, sys
sys.path[:] = {path!r}
from tests.parity.small import everywhere
from tests.parity.test_elementary import WRONG_KERNELS
planted = everywhere({operation!r}, WRONG_KERNELS[{operation!r}])
planted.__enter__()
pathlib.Path({marker!r}).touch()
"""


@contextmanager
def in_new_processes(
    operation: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Plant the wrong kernel in the new processes that are started inside a `with` block."""
    marker = folder / "planted"
    given = {"path": sys.path, "operation": operation, "marker": str(marker)}
    (folder / "sitecustomize.py").write_text(IN_NEW_PROCESSES.format(**given))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield
    assert marker.exists(), "no new process has planted the kernel"


@pytest.mark.usefixtures("model_alone")
@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(operation, marks=pytest.mark.slow if operation != "gelu" else ())
        for operation in WRONG_KERNELS
    ],
)
def test_a_kernel_that_is_wrong_in_every_dtype_is_named(operation: str) -> None:
    with everywhere(operation, WRONG_KERNELS[operation]):
        run = check_device(small_weights(d_vocab=100, n_ctx=8, n_layers=1), "cpu", F32)
    assert_named(operation, run)


def assert_named(operation: str, run: DeviceRun) -> None:
    """The verdict is WRONG, and the report names the operation."""
    assert run.verdict is Verdict.WRONG
    named = [run.located.operation] if run.located else []
    named += [check.note for check in run.invariants if check.verdict is Verdict.WRONG]
    assert any(f"aten.{operation}.default" in each for each in named), named
    assert max(check.allowed for check in run.invariants) < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("model_alone")
@pytest.mark.parametrize("operation", WRONG_KERNELS)
def test_a_kernel_that_is_wrong_in_new_processes_too_is_named(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariants, "INVARIANTS", (invariants.fresh_process,))
    with (
        everywhere(operation, WRONG_KERNELS[operation]),
        in_new_processes(operation, tmp_path, monkeypatch),
    ):
        run = check_device(small_weights(d_vocab=100, n_ctx=8, n_layers=1), "cpu", F32)
    assert_named(operation, run)


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["native_layer_norm", "gelu", "addmm"])
def test_a_kernel_that_is_wrong_only_in_new_processes_is_found(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_new_processes(operation, tmp_path, monkeypatch), torch.no_grad():
        model, tokens = small_model(small_weights(n_ctx=8)), torch.zeros(1, 2, dtype=torch.int64)
        ours, theirs = invariants.fresh_process(model, tokens, model(tokens))
    assert invariants.row_difference(ours, theirs) > 1e-5
