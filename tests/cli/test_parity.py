"""`parity` and `doctor`: exit statuses, one-line errors, and the files that they write."""

import json
from pathlib import Path

import pytest
import torch

from clean_transformer.parity import inputs
from clean_transformer.parity.faults import inject
from clean_transformer.parity.modes import MODES
from clean_transformer.parity.references.choose import REFERENCES, choose_reference
from clean_transformer.support.devices import is_available
from clean_transformer.support.dtypes import DTYPES

from ..helpers import random_model, tiny
from ..parity.small import small_weights
from .running import assert_one_line, call

REFERENCE = choose_reference("auto")[0]
ABSENT = next((kind for kind in ("mps", "cuda") if not is_available(kind)), None)


@pytest.fixture
def small(model_alone: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Small weights, and a folder of its own to run in."""
    weights = small_weights(n_layers=1, d_vocab=100, n_ctx=16)
    monkeypatch.setattr(inputs, "choose_weights", lambda source: weights)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_0_where_everything_passes(small: Path) -> None:
    result = call(
        "parity", "--devices", "cpu", "--reference", REFERENCE or "none", "--json", "r.json"
    )
    assert result.exit_code == (0 if REFERENCE else 3), result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"PyTorch {torch.__version__} ")
    assert "clean_transformer on small stress weights" in lines[:4]
    read = json.loads((small / "r.json").read_text())
    assert read["verdict"] == ("PASS" if REFERENCE else "NOT CHECKED")
    assert [*small.iterdir()] == [small / "r.json"]


def test_1_and_a_script_where_something_is_wrong(small: Path) -> None:
    with inject("gelu-tanh-ignored"):
        result = call("parity", "--devices", "cpu", "--reference", "none")
    assert result.exit_code == 1, result.output
    script = small / "reproduce-gelu-cpu-float32.py"
    assert [*small.iterdir()] == [script]
    assert script.name in result.stdout
    exec(compile(script.read_text(), str(script), "exec"), {})


@pytest.mark.slow
def test_1_where_the_function_is_another(small: Path) -> None:
    if REFERENCE is None:
        pytest.skip("no reference is installed")
    with inject("exact-gelu"):
        result = call("parity", "--devices", "cpu", "--rows")
    assert result.exit_code == 1
    assert "mlp.hook_post" in result.stdout
    assert [*small.iterdir()] == []


@pytest.mark.skipif(ABSENT is None, reason="this machine has every device")
@pytest.mark.parametrize("command", ["parity", "doctor"])
def test_3_where_something_is_not_checked(command: str, small: Path) -> None:
    assert ABSENT is not None
    result = call(command, "--device", ABSENT, *(["--reference", "none"] * (command == "parity")))
    assert result.exit_code == 3, result.output
    assert f"this machine has no {ABSENT}" in result.stdout
    assert "PASS" not in result.stdout


@pytest.mark.parametrize("command", ["parity", "doctor"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "gpu"), "unknown device 'gpu'"),
        (("--dtype", "fp8"), "no dtype 'fp8'"),
        (("--weights", "no/such/folder/here"), "no/such/folder/here"),
        (("--weights", "stress:tiny"), "no published GPT-2 has size 'tiny'"),
    ],
)
def test_2_and_one_line_for_what_cannot_be_done(
    command: str, arguments: tuple[str, str], message: str
) -> None:
    assert_one_line(call(command, *arguments), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode", "fast"), "no mode 'fast'"),
        (("--reference", "numpy"), "no reference 'numpy'"),
    ],
)
def test_2_and_one_line_for_what_parity_alone_takes(arguments, message: str) -> None:
    assert_one_line(call("parity", *arguments), message)


def test_2_for_a_negative_number_of_rows() -> None:
    result = call("parity", "--worst", -2)
    assert result.exit_code == 2
    assert "Invalid value for '--worst'" in result.output


@pytest.mark.parametrize("devices", ["all", "cpu,cuda"])
def test_the_doctor_checks_one_device(devices: str) -> None:
    assert_one_line(
        call("doctor", "--device", devices), f"doctor checks one device, not '{devices}'"
    )


@pytest.mark.parametrize(
    ("command", "option"), [("parity", "--json"), ("parity", "--html"), ("doctor", "--json")]
)
def test_2_before_any_work_where_the_report_cannot_be_written(
    command: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "choose_weights", lambda source: pytest.fail("too late"))
    assert_one_line(call(command, option, "no/report"), "no folder 'no' for 'report'")


def test_the_doctor(small: Path) -> None:
    result = call("doctor", "--device", "cpu", "--json", "doctor.json")
    assert result.exit_code == 0, result.output
    (small / "doctor.json").rename(small.parent / "before.json")
    assert "PASS cpu computes GPT-2 correctly in float32." in result.stdout
    assert "NOT CHECKED" not in result.stdout  # nobody asked for cuda or mps
    with inject("gelu-tanh-ignored"):
        result = call("doctor", "--device", "cpu", "--json", small.parent / "after.json")
    assert result.exit_code == 1
    assert "First failure: blocks.0.mlp.hook_post" in result.stdout
    assert [path.name for path in small.iterdir()] == ["reproduce-gelu-cpu-float32.py"]
    result = call("compare", small.parent / "before.json", small.parent / "after.json")
    assert result.exit_code == 1
    assert "run: PASS → WRONG" in result.stdout


def test_2_where_the_weights_are_not_finite(tmp_path: Path) -> None:
    model = random_model(tiny(), dtype=torch.float32)
    with torch.no_grad():
        model.blocks[1].mlp.b_in[3] = torch.nan
    model.save_pretrained(tmp_path)
    result = call("doctor", "--device", "cpu", "--weights", str(tmp_path))
    assert_one_line(result, "transformer.h.1.mlp.c_fc.bias contains NaN or infinity")


@pytest.mark.parametrize("command", ["parity", "doctor"])
def test_3_where_the_weights_do_not_fit(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weights = small_weights(n_layers=1, d_vocab=100, n_ctx=16)
    weights.state["unembed.b_U"][7] = 1e5
    monkeypatch.setattr(inputs, "choose_weights", lambda source: weights)
    monkeypatch.chdir(tmp_path)
    none = ["--reference", "none"] * (command == "parity")
    result = call(command, "--device", "cpu", "--dtype", "float16", *none)
    assert result.exit_code == 3, result.output
    told = " ".join(result.stdout.split())
    assert "does not fit into float16: the weight unembed.b_U reaches 100000" in told
    assert "WRONG" not in told


def test_the_help_names_every_choice() -> None:
    said = " ".join(call("parity", "--help").stdout.replace("│", " ").split())
    for choices in (MODES, DTYPES):
        assert ", ".join(choices) in said
    for reference in REFERENCES:
        assert f" {reference} (" in said
