import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clean_transformer.weights.formats.leveldb import masked_crc32c, write_table
from clean_transformer.weights.formats.tensor_bundle import DTYPES, read_bundle, write_bundle
from clean_transformer.weights.table import WeightsError

from ...helpers import assert_equal_states

DATA = Path(__file__).parent / "data"  # written by TensorFlow
SHARDS = ("shards.data-00000-of-00002", "shards.data-00001-of-00002")


def bits(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compared as these, a NaN equals itself and a zero only a zero of its sign."""
    return {name: tensor.flatten().view(torch.uint8) for name, tensor in state.items()}


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A copy of TensorFlow's bundle of two shards."""
    for file in DATA.glob("shards.*"):
        shutil.copy(file, tmp_path)
    return tmp_path / "shards"


# What TensorFlow wrote.


def test_every_dtype_of_tensorflow_from_shards_and_from_unaligned_places():
    written = {
        "bfloat16": torch.arange(3, dtype=torch.bfloat16),
        "double": torch.eye(2, dtype=torch.float64),
        "half": torch.arange(5, dtype=torch.float16),
        "scalar": torch.tensor(2.5),
    }
    assert_equal_states(read_bundle(DATA / "shards"), written)


def test_tensors_are_views_of_the_file(tmp_path: Path):
    tensors = read_bundle(DATA / "tiny/model.ckpt")
    assert len(tensors) == 28
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1


def test_what_is_written_into_a_tensor_stays_out_of_the_file(prefix: Path):
    before = (prefix.parent / SHARDS[0]).read_bytes()
    read_bundle(prefix)["bfloat16"].zero_()
    assert (prefix.parent / SHARDS[0]).read_bytes() == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("slices", r"slices\.index has weight in slices; save it whole"),
        ("integers", r"integers\.index has global_step with DataType 9, which is not floating-"),
    ],
)
def test_what_is_no_whole_floating_point_tensor(name: str, message: str):
    with pytest.raises(WeightsError, match=message):
        read_bundle(DATA / name)


# Writing.

tensors = st.builds(
    lambda dtype, shape, seed: (
        torch.randint(
            256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=torch.manual_seed(seed)
        )
        .view(dtype)
        .squeeze(-1)
    ),
    st.sampled_from([*DTYPES.values()]),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 2**32),
)


@given(st.dictionaries(st.text(min_size=1, max_size=9), tensors, max_size=20))
def test_what_is_written_is_read(tmp_path_factory, state: dict[str, Tensor]):
    folder = tmp_path_factory.mktemp("bundle")
    write_bundle(folder / "any.name", state)
    read = read_bundle(folder / "any.name")
    assert_equal_states(bits(read), bits(state))
    for name, tensor in read.items():
        assert (tensor.dtype, tensor.shape) == (state[name].dtype, state[name].shape)


def test_a_tensor_of_another_layout_is_written_by_its_values(tmp_path: Path):
    tensor = torch.arange(6.0, requires_grad=True).reshape(2, 3).T
    write_bundle(tmp_path / "b", {"transposed": tensor})
    assert torch.equal(read_bundle(tmp_path / "b")["transposed"], tensor)


def test_a_dtype_that_has_no_place(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"b is torch\.int8; convert it to one of .*float32"):
        write_bundle(tmp_path / "model", {"a": torch.ones(1), "b": torch.ones(1, dtype=torch.int8)})
    assert [*tmp_path.iterdir()] == []


# Damage.


# Of each file, the bytes that belong together, and how the message says where they are.
PLACES = [
    ("shards.index", range(206), r"shards\.index cannot be read as TensorFlow's index: "),
    (SHARDS[0], range(6), "00000-of-00002 is damaged in bfloat16; copy or"),
    (SHARDS[0], range(6, 38), "00000-of-00002 is damaged in double; copy or"),
    (SHARDS[1], range(10), "00001-of-00002 is damaged in half; copy or"),
    (SHARDS[1], range(10, 14), "00001-of-00002 is damaged in scalar; copy or"),
]


@pytest.mark.parametrize(("file", "place", "message"), PLACES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda content, at: content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :],
        lambda content, at: content[:at],
    ],
    ids=["flipped", "cut off"],
)
def test_damage_anywhere_is_told_by_name(
    prefix: Path, file: str, place: range, message: str, damage: Callable[[bytes, int], bytes]
):
    content = (prefix.parent / file).read_bytes()
    for at in place:
        (prefix.parent / file).write_bytes(damage(content, at))
        with pytest.raises(WeightsError, match=message):
            read_bundle(prefix)


def test_missing_files(prefix: Path):
    for file in SHARDS:
        (prefix.parent / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"no .*{SHARDS[0]} and no .*{SHARDS[1]}; copy or"):
        read_bundle(prefix)
    prefix.with_name("shards.index").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*shards\.index; copy or"):
        read_bundle(prefix)


HEADER = b"\x08\x01"  # 1 shard
ONES = masked_crc32c(torch.ones(2).numpy()).to_bytes(4, "little")
ENTRY = b"\x08\1\x12\4\x12\2\x08\2\x28\x08\x35" + ONES  # DT_FLOAT, [2], 8 bytes, checksum


@pytest.mark.parametrize(
    ("header", "entry", "message"),
    [
        (b"\x08\1\x10\1", ENTRY, "index is of a big-endian machine; save it on a little-endian"),
        (b"", ENTRY, "index contradicts itself on a; copy or"),
        (HEADER, ENTRY + b"\x18\1", "index contradicts itself on a; copy or"),  # shard 1
        (HEADER, ENTRY + b"\x28\4", "index contradicts itself on a; copy or"),  # 4 bytes
        (HEADER, ENTRY + b"\x12\4\x12\2\x08\3", "index contradicts itself on a; copy or"),  # [2, 3]
        (HEADER, ENTRY + b"\x20\1", r"data-00000-of-00001 is damaged in a; copy or"),  # from byte 1
        (HEADER, ENTRY + b"\x20" + b"\xff" * 9 + b"\1", "is damaged in a; copy or"),
        (HEADER, ENTRY + b"\x09", "index .* a field with the unknown tag 9; copy or"),
        (HEADER, ENTRY + b"\x3a\5", "index .* it ends too soon; copy or"),
        (HEADER, b"", "index has a with DataType 0, which is not floating-point"),
    ],
)
def test_nonsense_under_a_right_checksum(tmp_path: Path, header: bytes, entry: bytes, message: str):
    (tmp_path / "b.data-00000-of-00001").write_bytes(bytes(torch.ones(2).numpy()))
    (tmp_path / "b.index").write_bytes(write_table({b"": HEADER, b"a": ENTRY}))
    assert read_bundle(tmp_path / "b")["a"].tolist() == [1, 1]
    (tmp_path / "b.index").write_bytes(write_table({b"": header, b"a": entry}))
    with pytest.raises(WeightsError, match=message):
        read_bundle(tmp_path / "b")
