"""`clean-transformer train`: what it writes, and what it refuses."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from clean_transformer.cli.train import architecture
from clean_transformer.model import DemoTransformer
from clean_transformer.text.tokenizer import Tokenizer

from ..helpers import assert_equal_states, reading_model, trained
from ..training.runs import read_metrics
from .running import assert_one_line, call

SMALL = ("--n-layers", "1", "--n-heads", "2", "--d-model", "8", "--n-ctx", "8")
RUN = ("--steps", "3", "--batch", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With tokens in it, to run in."""
    monkeypatch.chdir(tmp_path)
    np.save("tokens.npy", np.arange(200, dtype=np.uint16) % 13)
    return tmp_path


def test_tokens_to_a_model_and_the_same_command_again(folder: Path):
    command = ("train", "tokens.npy", "--out", "run", *RUN, *SMALL, "--d-vocab", "13")
    for note in ("", "the run in run was finished already; nothing was trained\n"):
        result = call(*command)
        assert (result.exit_code, result.stdout) == (0, f"{note}wrote run/model\n"), result.output
        assert [line["step"] for line in read_metrics(folder / "run")] == [1, 2, 3]
    assert read_metrics(folder / "run")[-1]["held_out_loss"] > 0
    model = DemoTransformer.from_pretrained("run/model", device="cpu")
    saved = torch.load("run/checkpoint.pt", weights_only=True)
    assert_equal_states(model.state_dict(), saved["model"])

    # And on from there.
    result = call("train", "tokens.npy", "--out", "next", *RUN, "--weights", "run/model")
    assert result.exit_code == 0, result.output
    assert read_metrics(folder / "next")[0]["loss"] < read_metrics(folder / "run")[0]["loss"]


def test_text_to_a_model_that_reads_text(folder: Path):
    trained().save("tokenizer.json")
    Path("book.txt").write_text("The cat sat on the mat. " * 20)
    Path("other.txt").write_text("The cat sat. " * 4)
    files = ("book.txt", "--held-out", "other.txt", "--tokenizer", folder)
    result = call("train", *files, "--out", "run", *RUN, *SMALL)
    assert result.exit_code == 0, result.output
    model = DemoTransformer.from_pretrained("run/model", device="cpu")
    assert model.cfg.d_vocab == Tokenizer.from_pretrained("run/model").d_vocab == 270


def test_text_is_read_by_the_tokenizer_of_the_weights(folder: Path):
    reading_model(n_ctx=8, b_U=False).save_pretrained("weights")
    Path("book.txt").write_text("The cat sat on the mat. " * 20)
    result = call("train", "book.txt", "--out", "run", *RUN, "--weights", "weights")
    assert result.exit_code == 0, result.output
    assert Tokenizer.from_pretrained("run/model").vocab == Tokenizer(trained()).vocab


def test_other_sizes_keep_the_proportions_of_the_published():
    cfg = architecture("medium", n_layers=3, d_model=64)
    assert (cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head, cfg.d_mlp) == (3, 16, 64, 4, 256)
    assert architecture("xl").d_head == 64
    with pytest.raises(ValueError, match="12 heads cannot share a width of 64 equally"):
        architecture("small", d_model=64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tokens.npy", "--d-vocab", "9"), "the tokens have ids from 0 to 12"),
        (("tokens.npy", "--n-ctx", "1024"), "the tokens are only 180; one window of n_ctx=1024"),
        (("tokens.npy", "tokens.npy"), "there are 2 files"),
        (("none.npy",), "none.npy: No such file or directory"),
        (("tokens.npy", "--clip", "0"), "Training.clip is 0.0"),
        (("tokens.npy", "--accumulation", "2", "--batch", "3"), "must be a multiple of accum"),
        (
            ("tokens.npy", "--weights", "gpt2"),
            "leave out --n-layers, --n-heads, --d-model, --n-ctx",
        ),
        (("tokens.npy", "--sharded"), "sharded needs several processes"),
        (("tokens.npy", "--tokenizer", "demo"), "--tokenizer is for text files, and tokens.npy"),
    ],
)
def test_2_and_one_line_for_what_cannot_be_trained(folder: Path, arguments, message: str):
    assert_one_line(call("train", "--out", "run", *RUN, *SMALL, *arguments), message)
    assert [*folder.iterdir()] == [folder / "tokens.npy"]


def test_a_log_file_has_the_losses():
    result = call("train", "tokens.npy", "--out", "run", *RUN, *SMALL, "--d-vocab", "13")
    first, last = result.stderr.splitlines()
    assert re.fullmatch(r"1/3 loss \d\.\d{3}, [\d,]+ tokens/s", first)
    assert re.fullmatch(r"3/3 loss \d\.\d{3}, held out \d\.\d{3}, [\d,]+ tokens/s", last)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.txt", "--out", "run"), "none.txt: No such file or directory"),
        (("tokens.npy", "--held-out", "none", "--out", "run"), "none: No such file or directory"),
        ((".", "--out", "run"), ".: Is a directory"),
        (("tokens.npy", "--out", "tokens.npy"), "'tokens.npy' is a file; give the name of a fol"),
        (("tokens.npy", "--out", "tokens.npy/a/b"), "tokens.npy' is a file; give the name of a f"),
    ],
)
def test_files_are_tried_before_the_work(arguments, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Tokenizer, "from_pretrained", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(DemoTransformer, "__init__", lambda *_: pytest.fail("too late"))
    assert_one_line(call("train", *arguments, *RUN), message)
