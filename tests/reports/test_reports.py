"""What all reports share: plain values, numbers for people, heat maps."""

import json
import math
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from clean_transformer.parity.verdict import Verdict
from clean_transformer.reports.environment import (
    build_lines,
    device_settings,
    environment,
    float32_precision,
    full_float32_precision,
)
from clean_transformer.reports.heat_map import Square, block_of, heat_map, rank, shade
from clean_transformer.reports.page import number
from clean_transformer.reports.plain import Schema, plain, write_plain
from clean_transformer.reports.terminal import heat_map_table

LIMITS = (0.0, 1.0, 2.0, math.inf)


@dataclass
class Row:
    value: float
    verdict: Verdict
    parts: tuple[int, ...] = (1, 2)

    @property
    def rho(self) -> float:
        return -self.value

    @property
    def told_nowhere(self) -> str:
        return "secret"


def test_plain_values_are_what_json_has(tmp_path: Path) -> None:
    values = plain({"rows": [Row(math.inf, Verdict.WRONG), Row(math.nan, Verdict.NOT_CHECKED)]})
    assert values == {
        "rows": [
            {"value": "inf", "verdict": "WRONG", "parts": [1, 2], "rho": "-inf"},
            {"value": "nan", "verdict": "NOT CHECKED", "parts": [1, 2], "rho": "nan"},
        ]
    }
    write_plain(values, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == values


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (1234.5, 2, "1200"),
        (0.000012345, 3, "1.23e-05"),
        (0, 3, "0"),
        (math.inf, 3, "∞"),
        (-math.inf, 3, "−∞"),
        (math.nan, 3, "not a number"),
    ],
)
def test_numbers_for_people(value: float, digits: int, shown: str) -> None:
    assert number(value, digits) == shown


def test_shades() -> None:
    assert [shade(value, LIMITS) for value in (0.0, 0.5, 1.0, 1.1, 9.0, math.inf, math.nan)] == [
        0, 1, 1, 2, 3, 3, 3,
    ]  # fmt: skip
    assert rank(math.nan) == math.inf


def square(name: str, value: float, mark: str = "") -> Square:
    return Square({"name": name}, number(value), value, shade(value, LIMITS), "·-=#"[int(value)],
                  "blue", mark)  # fmt: skip


def test_a_map_has_rows_in_the_order_of_the_forward_pass() -> None:
    values = {
        "embed": 0.0,
        "blocks.0.mlp": 1.0,
        "blocks.0": 2.0,
        "blocks.2.mlp": 3.0,
        "logits": 1.0,
    }
    laid_out = heat_map({name: square(name, value) for name, value in values.items()})
    assert [*laid_out.rows] == ["embed", "mlp", "output", "logits"]
    assert laid_out.layers == [0, 2]
    assert laid_out.worst("mlp").facts["name"] == "blocks.2.mlp"
    assert laid_out.fields == ["name"]
    assert heat_map({}).fields == []
    # Without a square, a block still separates what comes before it from what comes after it.
    around = heat_map({"embed": square("embed", 0.0), "blocks.0": None, "end": square("end", 1.0)})
    assert ([*around.before], [*around.after], around.points) == (["embed"], ["end"], {})


def test_blocks() -> None:
    assert block_of("blocks.11.attn.hook_q") == (11, "attn.hook_q")
    assert block_of("blocks.3") == (3, "output")
    assert block_of("ln_final") == (None, "ln_final")


def test_the_table_of_a_terminal() -> None:
    total = {"a": square("a", 0.0), "blocks.0.b": square("b", 1.0), "blocks.11.b": square("b", 2.0)}
    total |= {"blocks.11.c": square("c", 3.0, "×")}
    own = {"blocks.0.b": square("b", 3.0)}
    console = Console(width=60, record=True, file=StringIO())
    console.print(heat_map_table({"total": heat_map(total), "own": heat_map(own)}))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines == [
        ["01", "total", "own"],
        ["a", "·", "0"],
        ["b", "-=", "2", "3"],
        ["c", "×", "3"],
    ]


def test_the_environment_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("TORCH_HOME", "/home/me")
    told = environment()
    assert told["torch"] == torch.__version__
    assert told["transformers"]
    assert told["threads"] == str(torch.get_num_threads())
    assert told["isa"] == torch.backends.cpu.get_cpu_capability()
    assert told["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert "TORCH_HOME" not in told
    assert all(isinstance(value, str) for value in told.values())
    build, variables = build_lines(told)
    changed = told | {"onednn enabled": "False", "attention kernels": ""}
    assert build_lines(changed)[1] == "Settings: onednn enabled = False; attention kernels = none"
    assert build.startswith(f"PyTorch {torch.__version__} (")
    for key in ("onednn", "isa", "system"):
        assert told[key] in build
    assert variables.startswith("Set: ")
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in variables
    assert build_lines({"torch": "2.4", "blas": "open", "isa": "DEFAULT"})[0].startswith(
        "PyTorch 2.4 (BLAS open), DEFAULT"
    )


def test_the_settings_of_a_device_and_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert device_settings(torch.device("mps")) == {}
    (name,) = before = float32_precision("cpu")
    monkeypatch.setenv("DNNL_DEFAULT_FPMATH_MODE", "BF16")
    assert device_settings(cpu) == before | {"DNNL_DEFAULT_FPMATH_MODE": "BF16"}
    try:
        torch.set_float32_matmul_precision("medium")
        lowered = float32_precision("cpu")[name]
        # Before torch 2.9, the setting has other values.
        assert lowered in ("bf16", "medium")
        assert f"Settings: {name} = {lowered}" in build_lines(environment())
        for device in ("cpu", "mps"):
            with full_float32_precision(device):
                now = float32_precision("cpu")[name]
                assert now in ("ieee", "highest") if device == "cpu" else now == lowered
        assert float32_precision("cpu")[name] == lowered
    finally:
        torch.set_float32_matmul_precision("highest")


def test_reports_are_read_by_format_and_version(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    schema = Schema("ours", 2)
    schema.write_json(square("a", 1.0), file)
    assert schema.read(file) == schema.to_json(square("a", 1.0))
    for other, said in (
        (Schema("theirs", 2), "has the format ours, not theirs"),
        (Schema("ours", 3), "an older clean_transformer: its format is ours version 2, and this"),
        (Schema("ours", 1), "a newer clean_transformer"),
    ):
        with pytest.raises(ValueError, match=said):
            other.read(file)
