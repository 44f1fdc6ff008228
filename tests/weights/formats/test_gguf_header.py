"""GGUF files that claim what they do not have."""

import struct
from pathlib import Path

import gguf
import pytest

from clean_transformer.model import DemoTransformer
from clean_transformer.weights.formats.gguf import GGUF, SIZES, write_gguf
from clean_transformer.weights.refusals import WeightsError

from ...helpers import TINY, random_model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "model.gguf", TINY, random_model().float().state_dict())
    return tmp_path / "model.gguf"


def change(file: Path, after: bytes, value: bytes, skip: int = 0) -> None:
    """Overwrite the bytes that follow the first `after` and `skip` further bytes."""
    raw = bytearray(file.read_bytes())
    place = raw.index(after) + len(after) + skip
    raw[place : place + len(value)] = value
    file.write_bytes(raw)


def refused(file: Path, message: str) -> None:
    with pytest.raises(WeightsError, match=rf"model\.gguf.*{message}"):
        DemoTransformer.from_pretrained(file, device="cpu")


@pytest.mark.parametrize("value", [1000, 2**63])
@pytest.mark.parametrize(("place", "name"), [(8, "tensors"), (16, "fields")])
def test_counts_beyond_the_file(file: Path, place: int, name: str, value: int):
    raw = bytearray(file.read_bytes())
    raw[place : place + 8] = struct.pack("<Q", value)
    file.write_bytes(raw)
    refused(file, "is damaged")


def test_a_string_beyond_the_file(file: Path):
    change(file, b"GGUF", struct.pack("<Q", 2**62), skip=20)
    refused(file, "its header is longer than the file")


@pytest.mark.parametrize("count", [10**6 + 10**9, 2**63])
def test_an_array_beyond_the_file(file: Path, count: int):
    key = b"general.architecture"
    change(file, key, struct.pack("<IIQ", 9, 0, count))
    refused(file, f"an array has {count} elements of the type 0")


def test_a_block_count_beyond_the_file(file: Path):
    change(file, SIZES["n_layers"].encode(), struct.pack("<I", 10**9), skip=4)
    refused(file, "has 1000000000 layers, but this GGUF gpt2 state dict has only")


# After the name of a matrix: 4 bytes for the number of axes, 8 for each, 4 for the type.
TO_OFFSET = 4 + 8 + 8 + 4


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (lambda own: 0, "overlaps another tensor"),
        (lambda own: own + 1, "overlaps another|is not aligned to 32"),
        (lambda own: 2**20, r"damaged \("),
        (lambda own: 2**63, r"damaged \("),
    ],
)
def test_offsets_of_other_tensors(file: Path, offset, message: str):
    reader = gguf.GGUFReader(file)
    [own] = [t.data_offset for t in reader.tensors if t.name == "blk.1.ffn_up.weight"]
    wrong = offset(int(own) - int(reader.data_offset))
    del reader
    change(file, b"blk.1.ffn_up.weight", struct.pack("<Q", wrong), skip=TO_OFFSET)
    refused(file, message)


def test_a_name_twice(file: Path):
    raw = file.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight")
    file.write_bytes(raw)
    refused(file, r"blk\.0\.ffn_up\.weight' occurs twice")


def test_another_version_and_another_file(file: Path):
    change(file, b"GGUF", struct.pack("<I", 9))
    refused(file, "version 9")
    file.write_bytes(b"FUGG" + file.read_bytes()[4:])
    refused(file, "does not begin as a GGUF file")
    assert GGUF.file is not None
