"""What the steps of a run read."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clean_transformer.text.tokenizer import END_OF_TEXT, Tokenizer
from clean_transformer.training.windows import load_tokens, refuse_tokens, tokenize, window

from ..helpers import TINY, trained, unchecked_types


@given(st.integers(1, 9), st.integers(1, 60), st.integers(0, 2**40))
def test_an_epoch_reads_every_token_once_and_the_next_in_another_order(
    length: int, more: int, seed: int
):
    tokens = np.arange(length + more, dtype=np.uint16)
    per_epoch = (len(tokens) - 1) // length
    for epoch in range(3):
        numbers = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        windows = [window(tokens, number, length, seed) for number in numbers]
        for read in windows:  # in one piece, with the token that follows
            assert read.tolist() == [*range(int(read[0]), int(read[0]) + length + 1)]
        inputs = sorted(int(token) for read in windows for token in read[:-1])
        assert inputs == [*range(inputs[0], inputs[0] + per_epoch * length)]


def test_the_order_is_the_seeds_and_another_in_each_epoch():
    tokens = np.arange(1001)

    def starts(first: int, seed: int) -> list[int]:
        return [int(window(tokens, first + n, 10, seed)[0]) for n in range(100)]

    assert starts(0, seed=3) == starts(0, seed=3)
    orders = [starts(0, 3), starts(100, 3), starts(0, 4)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(order != sorted(order) for order in orders)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_token_file_is_not_read_into_memory(tmp_path: Path, dtype):
    np.save(tmp_path / "tokens.npy", np.arange(40, dtype=dtype))
    tokens = load_tokens(tmp_path / "tokens.npy")
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == dtype
    assert window(tokens, 0, 39, 0).tolist() == [*range(40)]


# A header that Python's parser cannot nest, and an archive of several arrays without any.
DEEP = b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"[" * 9000
ARCHIVE = b"PK\5\6" + bytes(18)


@pytest.mark.parametrize("content", [b"", b"words", b"\x93NUMPY\x01\x00", DEEP, ARCHIVE])
def test_what_is_no_token_file_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "tokens.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokens\.npy is not a \.npy file .* numpy\.save"):
        load_tokens(tmp_path / "tokens.npy")


def test_texts_are_joined_by_the_end_of_text(tmp_path: Path):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, text in zip(files, ("one×", "two"), strict=True):
        file.write_text(text, encoding="utf-8")
    tokenizer = Tokenizer(trained())
    whole = tokenizer.to_tokens(f"{END_OF_TEXT}one×{END_OF_TEXT}two", prepend_bos=False)
    assert tokenize(files, tokenizer).tolist() == whole[0].tolist()


def test_line_breaks_are_read_as_they_are_written(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc")
    tokenizer = Tokenizer(trained())
    tokens = tokenize([tmp_path / "a.txt"], tokenizer)
    assert tokenizer.to_string(tokens[1:].tolist()) == "a\r\nb\rc"


def test_a_text_that_is_not_utf_8_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text"):
        tokenize([tmp_path / "a.txt"], Tokenizer(trained()))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            np.zeros(10, int),
            "they are only 10; one window of n_ctx=10 and .* after it need 11:",
        ),
        (np.full(11, 31, np.uint16), "ids from 31 to 31; this model's vocabulary has ids 0 to 30"),
        (np.full(11, -1), "ids from -1 to -1"),
        (np.zeros(11), r"float64 of shape \[11\]; they must be integers \[pos\]"),
        (np.zeros((2, 11), int), r"int64 of shape \[2, 11\]"),
    ],
)
def test_tokens_that_a_model_cannot_read_are_refused(tokens, message: str):
    with pytest.raises(ValueError, match=message), unchecked_types():
        refuse_tokens("they", tokens, TINY)


def test_tokens_for_a_single_window_are_enough():
    refuse_tokens("they", np.zeros(11, np.uint16), TINY)
