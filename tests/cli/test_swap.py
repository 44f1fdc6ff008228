"""`swap`: what it prints and writes, and its one-line errors."""

import json
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from clean_transformer.parity import inputs
from clean_transformer.text.tokenizer import END_OF_TEXT
from clean_transformer.weights import hub

from ..parity.small import small_weights
from .running import assert_one_line, call

OWN = """
from torch import nn


class Halved(nn.Module):
    def __init__(self, cfg):
        super().__init__()

    def forward(self, x):
        return x / 2


class Broken(Halved):
    def forward(self, x):
        return x.no_such_thing()


def same(old, path):
    return old
"""


@pytest.fixture
def folder(one_thread: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Small weights, a folder to run in, and a file of one's own in it."""
    weights = small_weights(n_layers=2, d_vocab=300, n_ctx=16)
    monkeypatch.setattr(inputs, "choose_weights", lambda source: weights)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


@pytest.fixture
def tokenizer(folder: Path) -> Path:
    """The bytes and <|endoftext|>, as a tokenizer."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END_OF_TEXT]
    vocab = {word: token for token, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    (folder / "weights").mkdir()
    backend.save(str(folder / "weights" / "tokenizer.json"))
    return folder / "weights"


def test_it_prints_and_writes_what_changed(folder: Path) -> None:
    result = call(
        *("swap", "--module", "blocks.1.attn", "--with", "own.py:Halved"),
        *("--device", "cpu", "--json", "e.json", "--html", "e.html"),
    )
    assert result.exit_code == 0, result.output
    first, tokens, swapped = result.stdout.splitlines()[:3]
    assert first == "small stress weights; on ids spread over the vocabulary"
    assert tokens == "2 × 16 tokens, float32 on cpu"
    assert swapped == "swapped: Attention → Halved at blocks.1.attn"
    said = " ".join(result.stdout.split())
    assert "attn.hook_q, " in said
    assert "in block 1: only the original model makes it" in said
    assert "Warning" not in result.stderr
    read = json.loads((folder / "e.json").read_text())
    [told] = read["swapped"]
    assert told["path"] == "blocks.1.attn"
    assert (told["old"], told["new"]) == ("Attention", "Halved")
    names = ["W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"]
    assert told["parameters"]["left_over"] == names
    assert "parameters at blocks.1.attn: left over of the old W_Q, W_K" in said
    felt = read["impact"]
    assert f"output: {felt['top1_flips']} of 32 top-1 predictions flipped" in result.stdout
    assert "Attention → Halved" in (folder / "e.html").read_text(encoding="utf-8")
    assert {file.name for file in folder.iterdir()} == {"own.py", "e.json", "e.html"}


def test_a_tokenizer_needs_a_text(folder: Path, tokenizer: Path) -> None:
    place = ("--module", "blocks.1.attn", "--with", "own.py:Halved", "--device", "cpu")
    result = call("swap", *place, "--tokenizer", tokenizer)
    assert_one_line(result, "--tokenizer is for a text; give one")


AHEAD = """
class Ahead(Halved):
    def forward(self, x):
        return x.flip(1)


class NeverSet(Halved):
    def __init__(self, cfg):
        super().__init__(cfg)
        import torch

        self.W_Q = nn.Parameter(torch.empty(cfg.n_heads, cfg.d_model, cfg.d_head))
        self.W_Value = nn.Parameter(torch.empty(cfg.n_heads, cfg.d_model, cfg.d_head))
"""


def test_it_says_what_is_wrong_with_a_module(folder: Path) -> None:
    (folder / "own.py").write_text(OWN + AHEAD)
    place = ("swap", "--module", "blocks.1.attn", "--device", "cpu", "--with")
    result = call(*place, "own.py:Ahead")
    assert result.exit_code == 0, result.output
    assert "LOOKS AHEAD: its output at a position depends on later" in " ".join(
        result.stdout.split()
    )
    assert "Warning" not in result.stderr
    result = call(*place, "own.py:NeverSet")
    assert_one_line(result, "blocks.1.attn: NeverSet never sets W_Value, and the old module has no")


def test_json_alone_goes_to_standard_output(folder: Path) -> None:
    result = call(*SAME, "--json", "-")
    assert json.loads(result.stdout)["schema"] == "clean-transformer/effect"
    assert "small stress weights" in result.stderr


def test_the_same_module_changes_nothing(folder: Path) -> None:
    arguments = ("--device", "cpu", "--dtype", "bfloat16")
    result = call("swap", "--module", "blocks.*.mlp", "--with", "own.py:same", *arguments)
    assert result.exit_code == 0, result.output
    assert "bfloat16 on cpu" in result.stdout
    assert "0 of 32 top-1 predictions flipped, KL divergence 0 nats, loss +0 nats" in result.stdout
    assert "no activation changed" in result.stdout


SAME = ("swap", "--module", "blocks.0.mlp", "--with", "own.py:same", "--device", "cpu")


def test_a_text_is_read_where_there_is_a_tokenizer(tokenizer: Path) -> None:
    result = call(*SAME, "Hello, you", "--weights", str(tokenizer))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[:2] == [
        "small stress weights; on 'Hello, you'",
        "1 × 11 tokens, float32 on cpu",
    ]


def test_a_text_comes_from_an_argument_a_file_or_standard_input(tokenizer: Path) -> None:
    Path("text").write_text("Hello, you\n")
    own = ("--weights", str(tokenizer))
    printed = call(*SAME, "Hello, you", *own).stdout
    assert call(*SAME, "--file", "text", *own).stdout == printed
    assert call(*SAME, "-", *own, stdin="Hello, you\n").stdout == printed
    other = call(*SAME, "Hello, you", "--weights", "stress", "--tokenizer", str(tokenizer))
    assert other.stdout == printed
    assert_one_line(call(*SAME, "Hello", "--file", "text", *own), "there are two texts")


def test_a_text_that_cannot_be_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(source: str, wanted: object, optional: object = ()) -> Path:
        raise hub.HubError(f"no network for {source}")

    monkeypatch.setattr(hub, "fetch", unreachable)
    for weights in ("plain:medium", "gpt2"):
        result = call(*SAME, "Hello", "--weights", weights)
        assert_one_line(result, "no network for gpt2")


@pytest.mark.usefixtures("one_thread")
def test_a_text_for_gpt2_out_of_reach_is_read_by_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = hub.fetch

    def unreachable(source: str, wanted: hub.FileSets, optional: tuple[str, ...] = ()) -> Path:
        if source == "gpt2":
            raise hub.HubError("no network today")
        return fetch(source, wanted, optional)

    for module in (hub, inputs):
        monkeypatch.setattr(module, "fetch", unreachable)
    make = ("--module", "blocks.0.mlp", "--with", "variants.ReluMLP", "--device", "cpu")
    result = call("swap", "Once upon a time", *make)
    assert result.stderr.startswith("note: ")
    assert result.stdout.startswith("the weights of demo; on 'Once upon a time'\n1 × 5 tokens")


@pytest.mark.parametrize(
    ("module", "make", "message"),
    [
        ("blocks.0.mpl", "own.py:same", "did you mean one of ['blocks.0.mlp'"),
        ("blocks.0.mlp", "none.py:same", "there is no Python file"),
        ("blocks.0.mlp", "own.py:sane", "has no class or function 'sane'; did you mean"),
        ("blocks.0.mlp", "own.py:Broken", "own.py, line 15: blocks.0.mlp: Broken, given"),
        ("unembed", "own.py:Halved", "unembed: Halved, given 'batch pos d_model'"),
    ],
)
def test_2_and_one_line_for_what_cannot_be_swapped(
    folder: Path, module: str, make: str, message: str
) -> None:
    assert_one_line(call("swap", "--module", module, "--with", make), message)
    assert [*folder.iterdir()] == [folder / "own.py"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "gpu"), "unknown device 'gpu'"),
        (("--dtype", "fp8"), "no dtype 'fp8'"),
        (("--weights", "no/such/folder/here"), "no/such/folder/here"),
    ],
)
def test_2_and_one_line_for_what_cannot_be_run(
    arguments: tuple[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own.py").write_text(OWN)
    make = f"{tmp_path / 'own.py'}:same"
    assert_one_line(call("swap", "--module", "embed", "--with", make, *arguments), message)


def test_a_text_that_is_too_long_is_refused(tokenizer: Path) -> None:
    result = call(*SAME, "Hello, you there, whoever", "--weights", str(tokenizer))
    assert_one_line(result, "26 tokens are more than the n_ctx=16 positions")


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_2_before_any_work_where_the_report_cannot_be_written(
    option: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "choose_weights", lambda source: pytest.fail("too late"))
    assert_one_line(call(*SAME, option, "no/report"), "no folder 'no' for 'report'")
