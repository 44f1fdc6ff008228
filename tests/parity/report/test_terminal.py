"""What a person and a program see."""

import io
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from clean_transformer.analysis.comparison import Impact
from clean_transformer.parity.activations.drift import EndToEnd
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.locate import Located
from clean_transformer.parity.report.json import SCHEMA, to_json, write_json
from clean_transformer.parity.report.terminal import print_diagnosis, print_report
from clean_transformer.parity.report.wording import (
    describe,
    group_of,
    script_name,
)
from clean_transformer.parity.results import DeviceRun, SuiteReport
from clean_transformer.parity.same_function import Comparison, ParityReport
from clean_transformer.parity.verdict import Check, Verdict

from ..small import small_weights


def row(name: str, ratio: float = 1.0, **changes) -> Isolated:
    healthy = Isolated(
        name, "2 × 33 tokens", "fused", "linear", ratio, 30.0, 128.0, ratio, 24.0, (1, 2), (ratio,)
    )
    return replace(healthy, **changes)


LOCATED = Located(
    where="blocks.1.mlp.hook_pre",
    operation="aten.mm.default",
    operands=("float32 [66, 128], stride [128, 1], storage offset 0, cpu",),
    ratio=5000.0,
    bits=3.0,
    diagnosis="wrong only when argument 2 (mat2) is not contiguous",
    known=("linear-noncontiguous-weight: pytorch#161640; Call .contiguous().",),
    script="import torch\n",
)
WRONG_RUN = DeviceRun(
    "cuda:1",
    "float32",
    settings={"name": "a GPU"},
    isolated=[row("hook_embed"), row("blocks.0.mlp.hook_pre"), row("blocks.1.mlp.hook_pre", 5e3)],
    end_to_end=[EndToEnd("logits", 3e-4, 1e-5, 2.0, reference_error=2e-5)],
    invariants=[Check("causality", Verdict.PASS, 0.0, 1e-6, "bit-identical")],
    probes=[Check("gelu, offset", Verdict.WRONG, math.inf)],
    impact=Impact(66, 4, math.nan, 0.5),
    located=LOCATED,
)
SAME = ParityReport(
    "TransformerBridge 4.3.0",
    [
        Comparison("hook_embed", "hook_embed", 1e-16, 1.0, 1e-12),
        Comparison("blocks.0.hook_odd", "", 0.0, 1.0, 1e-12, "no activation of ours is this one"),
    ],
)
REPORT = SuiteReport(
    weights="small weights",
    cfg=small_weights().cfg,
    tokens=(2, 33),
    environment={"torch": torch.__version__, "isa": "AVX2", "MKL_CBWR": "AVX2"},
    same_function=SAME,
    no_reference="",
    runs=[WRONG_RUN, DeviceRun("mps", "float32", not_checked="this machine has no mps")],
)


def printed(show, *args, width: int = 160, **options) -> str:
    file = io.StringIO()
    show(*args, Console(file=file, width=width), **options)
    return file.getvalue()


def test_the_terminal_says_the_verdict_first_and_then_where_and_why() -> None:
    text = printed(print_report, REPORT)
    lines = text.splitlines()
    assert lines[0].startswith(f"PyTorch {torch.__version__} (")
    assert lines[1] == "Set: MKL_CBWR=AVX2"
    assert lines[2:4] == ["clean_transformer on small weights", "verdict: WRONG"]
    assert lines[-1] == "verdict: WRONG"
    parts = [
        "1 of its 2 cached activations (50%)",
        "NOT CHECKED blocks.0.hook_odd: no activation of ours is this one",
        "2. Does cuda:1 compute float32 accurately?  WRONG",
        "mlp.hook_pre",
        "·W",
        "causality",
        "gelu, offset",
        "up to 30.00 times the error of random rounding",
        "4 of 66 top-1 predictions flipped",
        "3. Where does it first go wrong?  blocks.1.mlp.hook_pre",
        "aten.mm.default, in blocks.1.mlp.hook_pre",
        "matches the known issue linear-noncontiguous-weight",
        "reproduction: reproduce-mm-cuda1-float32.py",
        "2. Does mps compute float32 accurately?  NOT CHECKED",
        "this machine has no mps",
    ]
    place = 0
    for part in parts:
        place = text.find(part, place)
        assert place >= 0, part


def test_the_map_shows_every_layer_of_the_largest_model_on_a_narrow_terminal() -> None:
    layers = [row(f"blocks.{n}.attn.hook_attn_scores", 5e3 if n == 47 else 1.0) for n in range(48)]
    run = replace(WRONG_RUN, isolated=layers)
    text = printed(print_report, replace(REPORT, runs=[run]), width=80)
    _, found, rest = text.partition("  attn.hook_attn_scores  ")
    assert found
    assert rest.partition("\n\n")[0].count("·") == 47
    assert max(map(len, text.splitlines())) <= 80


def test_rows_are_printed_on_demand_the_worst_first() -> None:
    text = printed(print_report, REPORT, worst_rows=1)
    assert text.count("blocks.0.mlp.hook_pre") < text.count("blocks.1.mlp.hook_pre")
    everything = printed(print_report, REPORT, all_rows=True)
    assert everything.count("blocks.0.mlp.hook_pre") > text.count("blocks.0.mlp.hook_pre")


def test_without_a_reference_the_reason_is_printed() -> None:
    report = replace(REPORT, same_function=None, no_reference="none is installed", runs=[])
    text = printed(print_report, report)
    assert "1. Is it the same function?  NOT CHECKED" in text
    assert "none is installed" in text


RIGHT_RUN = replace(WRONG_RUN, isolated=[row("a")], end_to_end=[], probes=[], located=None)
ABSENT = DeviceRun("mps", "float32", not_checked="this machine has no mps")


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (WRONG_RUN, "WRONG cuda:1 computes GPT-2 wrongly. Do not trust its results."),
        (RIGHT_RUN, "PASS cuda:1 computes GPT-2 correctly in float32."),
        (ABSENT, "NOT CHECKED mps: this machine has no mps"),
    ],
    ids=["wrong", "right", "absent"],
)
def test_the_doctor_speaks_plainly(run: DeviceRun, says: str) -> None:
    text = printed(print_diagnosis, run, "small weights")
    first, second, third, *_ = (line for line in text.splitlines() if not line.startswith("Set: "))
    assert first.startswith(f"{run.device} in {run.dtype}: PyTorch {torch.__version__} (")
    assert (second, third) == ("GPT-2 with small weights", says)
    assert ("reproduction: reproduce-mm-cuda1-float32.py" in text) is bool(run.located)
    assert ("NOT CHECKED" in text) is bool(run.not_checked)  # other devices were not asked for


def test_a_bad_row_in_a_sentence() -> None:
    sentence = describe(row("", 40.0, per_head=(1.0, 40.0), lower_precision="TF32"))
    assert sentence.startswith(
        "logits (linear; 2 × 33 tokens, fused): error 40 roundings, healthy up to 30; "
        "24.0 correct bits; worst at [1, 2], head 1"
    )
    assert sentence.endswith("; the errors are those of TF32 (no setting asks for it)")
    torch.set_float32_matmul_precision("medium")
    try:
        sentence = describe(row("", 40.0, lower_precision="bfloat16"))
    finally:
        torch.set_float32_matmul_precision("highest")
    setting = "torch.backends.mkldnn.matmul.fp32_precision = bf16"
    if torch.__version__ < "2.9":  # it has no such setting
        setting = "torch.get_float32_matmul_precision() = medium"
    assert f"of bfloat16 ({setting})" in sentence


def test_groups() -> None:
    assert group_of("blocks.11.attn.hook_z") == "block 11"
    assert group_of("hook_embed") == group_of("") == "outside"


def test_json_has_every_field_and_no_number_that_json_has_not(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text("old")
    write_json(REPORT, file)
    assert [*tmp_path.iterdir()] == [file]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(file.read_text(), parse_constant=refuse)
    assert read == to_json(REPORT)
    assert (read["schema"], read["version"], read["verdict"]) == (SCHEMA.name, 2, "WRONG")
    assert read.keys() == {"schema", "version", "verdict"} | {f.name for f in fields(SuiteReport)}
    run = read["runs"][0]
    assert run.keys() == {"verdict", "first_failure", "by_use"} | {
        f.name for f in fields(DeviceRun)
    }
    assert run["first_failure"] == run["isolated"][2]
    assert read["runs"][1]["first_failure"] is None
    assert run["isolated"][2].keys() == {"verdict"} | {f.name for f in fields(Isolated)}
    assert [found["verdict"] for found in run["isolated"]] == ["PASS", "PASS", "WRONG"]
    assert run["end_to_end"][0]["rho"] == pytest.approx(30)
    assert run["probes"][0]["measured"] == "inf"
    assert run["impact"]["kl_divergence"] == "nan"
    assert read["same_function"]["coverage"] == [1, 2]
    assert read["runs"][1]["verdict"] == "NOT CHECKED"


def test_an_unwritable_place_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        write_json(REPORT, tmp_path / "missing" / "report.json")
    assert [*tmp_path.iterdir()] == []


def test_script_names_differ_by_device_and_dtype() -> None:
    assert script_name(WRONG_RUN) == "reproduce-mm-cuda1-float32.py"
    assert script_name(DeviceRun("cpu", "bfloat16")) == "reproduce-nothing-cpu-bfloat16.py"


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (
            EndToEnd("logits", 3e-4, 1e-5, 2.0),
            "logits (end to end): error 30 times that of random rounding, healthy up to 2",
        ),
        (Check("causality", Verdict.WRONG, 0.5, 0.25, "why"), "causality: 0.5, allowed 0.25; why"),
        (Check("gelu, offset", Verdict.WRONG, 99.0), "gelu, offset: 99"),
        (
            row("blocks.0.mlp", 24.0, path="black box", operation="black box"),
            "blocks.0.mlp (black box; 2 × 33 tokens): error 24 roundings, "
            "healthy up to 30; 24.0 correct bits; worst at [1, 2], head 0",
        ),
    ],
)
def test_other_failures_in_a_sentence(failure: EndToEnd | Check | Isolated, sentence: str) -> None:
    assert describe(failure) == sentence


def test_the_doctor_lists_what_else_is_broken() -> None:
    broken = [Check(f"operation {n}", Verdict.WRONG, float(n)) for n in range(9)]
    text = printed(print_diagnosis, replace(RIGHT_RUN, probes=broken), "small weights")
    assert "First failure: operation 0: 0\n" in text
    others = [line for line in text.splitlines() if line.startswith("Also broken: ")]
    assert others == [f"Also broken: operation {n}: {n}" for n in range(1, 6)]
