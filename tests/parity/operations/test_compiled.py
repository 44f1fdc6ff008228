"""Compiled code is judged as it is compiled, in whatever way a person compiles it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clean_transformer.cli.options import choose_compilation
from clean_transformer.parity import check_operations
from clean_transformer.parity.operations import compiled
from clean_transformer.parity.operations.diagnosis import Cause
from clean_transformer.parity.verdict import Verdict
from clean_transformer.support.devices import import_packages

from ...helpers import needs_torch

WATCHES = needs_torch("2.6", "calls of compiled code cannot be watched")

# A wrong backend, and a right one.
MODELS = """
import torch
from torch import nn

def scaled(factor):
    def backend(graph, inputs):
        return lambda *args: tuple(factor * output for output in graph.forward(*args))
    return backend

class MLP(nn.Module):
    def __init__(self, backend=None):
        super().__init__()
        self.into, self.out = nn.Linear(16, 32), nn.Linear(32, 16)
        self.between = nn.functional.gelu
        if backend is not None:
            self.between = torch.compile(lambda pre: nn.functional.gelu(pre), backend=backend)

    def forward(self, x):
        return self.out(self.between(self.into(x)))

def make(way, factor):
    torch.manual_seed(0)
    backend = "aot_eager" if factor == 1 else scaled(factor)
    model = MLP(backend if way == "function" else None)
    if way == "module":
        return torch.compile(model, backend=backend)
    if way == "in place":
        model.compile(backend=backend)
    if way == "forward":
        model.forward = torch.compile(model.forward, backend=backend)
    if way == "part":
        model.into = torch.compile(model.into, backend=backend)
    return model

def make_inputs():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
"""
WAYS = ("module", "in place", "forward", "part", "function")
JUDGED = (
    MODELS
    + """
import sys
from clean_transformer.parity import assert_parity, check_model, check_operations

def assertion(model, x):
    try:
        assert_parity(model, x, device="cpu")
    except AssertionError as error:
        return "WRONG" if "WRONG" in str(error) or "compiled" in str(error) else str(error)
    return "PASS"

for way in sys.argv[1:]:
    for factor in (1, 1.1):
        model, x = make(way, factor), make_inputs()
        model(x)  # a compiled function that has already run is judged, too
        uses = [use.verdict.value for use in check_model(model, x).uses]
        said = [*uses, check_operations(model, x).verdict.value, assertion(model, x)]
        with torch.no_grad():
            is_scaled = not torch.equal(model(x), make(way, 1)(x))
        print(way, *said, is_scaled)
"""
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def expected(way: str) -> list[str]:
    # The model still runs its compiled code after the checks.
    return [f"{way} PASS PASS PASS PASS False", f"{way} WRONG WRONG WRONG WRONG True"]


@WATCHES
@pytest.mark.parametrize("way", WAYS)
def test_a_wrong_backend(way: str) -> None:
    """In this process, too, in which shapes and types of arguments are checked at each call."""
    made: dict[str, Any] = {}
    exec(MODELS, made)
    report = check_operations(made["make"](way, 1.1), made["make_inputs"]())
    assert report.verdict is Verdict.WRONG
    assert report.finding is not None
    assert report.finding.cause is Cause.COMPILED


DTYPES = """
def lowered(x):
    return (x.bfloat16() @ x.bfloat16().T).float(), x * 3.3, (x * 3.3).bfloat16()
"""


@WATCHES
def test_each_output_is_judged_in_its_own_dtype_and_in_the_lowest_inside() -> None:
    made: dict[str, Any] = {}
    exec(MODELS + DTYPES, made)
    x = made["make_inputs"]()[0]
    for factor, verdict in ((1, Verdict.PASS), (3.0, Verdict.WRONG)):
        backend = "eager" if factor == 1 else made["scaled"](factor)
        with torch.no_grad():
            report = check_operations(torch.compile(made["lowered"], backend=backend), x)
        assert report.verdict is verdict


@WATCHES
def test_code_without_a_graph_is_not_checked_after_another_graph() -> None:
    made: dict[str, Any] = {}
    exec(MODELS, made)
    assert check_operations(made["make"]("function", 1), made["make_inputs"]()).compared

    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    for _ in range(2):  # before and after the first run
        report = check_operations(torch.compile(breaks, backend="eager"), torch.ones(2))
        assert report.not_checked == {"compiled breaks": 1}


@pytest.mark.slow
def test_what_is_not_compiled_is_not_checked() -> None:
    code = """
torch._dynamo.config.suppress_errors = True
from clean_transformer.parity import check_operations
def idle(graph, inputs):
    raise NotImplementedError("no kernel")
model = MLP()
model.compile(backend=idle)
print([*check_operations(model, make_inputs()).not_checked])
"""
    done = run("-c", MODELS + code)
    assert done.stdout.strip() == "['compiled MLP']", done.stderr


@WATCHES
def test_an_unknown_way_to_call_compiled_code_is_not_checked(monkeypatch) -> None:
    made: dict[str, Any] = {}
    exec(MODELS, made)
    monkeypatch.setattr(compiled, "CALL", {"self", "another_name"})
    with pytest.raises(NotImplementedError, match="calls compiled code in a way that cannot be"):
        check_operations(made["make"]("in place", 1), made["make_inputs"]())


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_compile(way: str) -> None:
    done = run("-c", JUDGED, way)
    assert done.stdout.splitlines() == expected(way), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "status"), [(1, 0), (1.1, 1)])
@pytest.mark.parametrize("way", WAYS)
def test_the_command_check(tmp_path: Path, way: str, factor: float, status: int) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"{MODELS}\ndef model():\n    return make({way!r}, {factor})\n")
    done = run("-m", "clean_transformer", "check", f"{file}:model", "--device", "cpu")
    assert done.returncode == status, done.stdout + done.stderr
    assert "compiled" in done.stdout


SUITE = """
import torch
from torch._dynamo import register_backend
from clean_transformer.config import Config
from clean_transformer.parity.inputs import Weights
from clean_transformer.parity.modes import Compilation
from clean_transformer.parity.suite import check_device
from clean_transformer.weights.synthetic import stress

torch.set_num_threads(1)

@register_backend
def scaled(graph, inputs):
    return lambda *args: tuple(1.1 * output for output in graph.forward(*args))

@register_backend
def idle(graph, inputs):
    raise NotImplementedError("no kernel")

cfg = Config(n_layers=1, n_heads=1, d_model=32, d_head=32, d_mlp=32, d_vocab=50, n_ctx=8)
for name in ("eager", "scaled", "idle"):
    torch._dynamo.reset()
    run = check_device(
        Weights("", cfg, stress(cfg)), "cpu", torch.float32, mode="compiled",
        compilation=Compilation(name),
    )
    graphs = int(run.settings["graphs compiled"])
    print(run.verdict.value, run.settings["compile backend"], graphs > 0)
"""


@pytest.mark.slow
def test_the_suite_compiles_with_the_chosen_backend() -> None:
    done = run("-c", SUITE)
    assert done.stdout.splitlines() == [
        "PASS eager True",
        "WRONG scaled True",
        "NOT CHECKED idle False",
    ], done.stderr[-2000:]


def test_an_unknown_backend_or_package() -> None:
    with pytest.raises(ValueError, match="no compile backend 'nonesuch'; choose from"):
        choose_compilation("nonesuch", dynamic=False, mode=None)
    with pytest.raises(ValueError, match="only inductor has modes"):
        choose_compilation("aot_eager", dynamic=False, mode="max-autotune")
    with pytest.raises(ValueError, match="cannot import no_such_package"):
        import_packages(["no_such_package"])


@pytest.mark.slow
def test_a_backend_that_would_be_ignored_is_refused() -> None:
    done = run("-m", "clean_transformer", "parity", "--weights=demo", "--compile-backend=eager")
    assert done.returncode == 2
    assert "add --mode compiled" in " ".join(done.stderr.split())


@pytest.mark.skipif(compiled.can_watch(), reason="this PyTorch shows calls of compiled code")
@pytest.mark.parametrize("way", WAYS)
def test_an_old_pytorch_refuses_compiled_code(way: str) -> None:
    made: dict[str, Any] = {}
    exec(MODELS, made)
    with pytest.raises(NotImplementedError, match="calls compiled code in a way that cannot be"):
        check_operations(made["make"](way, 1.1), made["make_inputs"]())
