import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from clean_transformer.weights.formats.crc32c import masked_crc32c
from clean_transformer.weights.formats.tensorflow import (
    DTYPES,
    read_bundle,
    read_table,
)
from clean_transformer.weights.refusals import WeightsError

from ...helpers import assert_equal_states
from .bundles import entry, table, table_of_blocks, varint, write_bundle

DATA = Path(__file__).parent / "data"  # written by TensorFlow
TABLE = (DATA / "shards.index").read_bytes()
SHARDS = ("shards.data-00000-of-00002", "shards.data-00001-of-00002")


def bits(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The bytes of each tensor, because NaN does not equal itself and −0 equals 0."""
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
        ("slices", r"slices\.index: weight was saved in slices; save it whole"),
        ("integers", r"integers\.index: global_step has the DataType 9, which is not floating-"),
    ],
)
def test_what_is_no_whole_floating_point_tensor(name: str, message: str):
    with pytest.raises(WeightsError, match=message):
        read_bundle(DATA / name)


# What other writers may write.

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


def test_without_the_checksum_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    message = r"need the google-crc32c package; pip install 'clean-transformer\[tensorflow\]'$"
    with pytest.raises(WeightsError, match=message):
        read_bundle(DATA / "shards")


# Damage.


# Of each file, the bytes that belong together, and how the message says where they are.
PLACES = [
    ("shards.index", range(206), r"shards\.index is not a valid TensorFlow index: "),
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
        (
            b"\x08\1\x10\1",
            ENTRY,
            "index is from a big-endian machine; save the model on a little-endian",
        ),
        (b"", ENTRY, "index contradicts itself about a; copy or"),
        (HEADER, ENTRY + b"\x18\1", "index contradicts itself about a; copy or"),  # shard 1
        (HEADER, ENTRY + b"\x28\4", "index contradicts itself about a; copy or"),  # 4 bytes
        (
            HEADER,
            ENTRY + b"\x12\4\x12\2\x08\3",
            "index contradicts itself about a; copy or",
        ),  # [2, 3]
        (HEADER, ENTRY + b"\x20\1", r"data-00000-of-00001 is damaged in a; copy or"),  # from byte 1
        (HEADER, ENTRY + b"\x20" + b"\xff" * 9 + b"\1", "is damaged in a; copy or"),
        (HEADER, ENTRY + b"\x09", "index: a field has the unknown tag 9; copy or"),
        (HEADER, ENTRY + b"\x3a\5", "index: the data ends too soon; copy or"),
        (HEADER, b"", "index: a has the DataType 0, which is not floating-point"),
    ],
)
def test_nonsense_in_a_message_under_a_right_checksum(
    tmp_path: Path, header: bytes, entry: bytes, message: str
):
    (tmp_path / "b.data-00000-of-00001").write_bytes(bytes(torch.ones(2).numpy()))
    (tmp_path / "b.index").write_bytes(table({b"": HEADER, b"a": ENTRY}))
    assert read_bundle(tmp_path / "b")["a"].tolist() == [1, 1]
    (tmp_path / "b.index").write_bytes(table({b"": header, b"a": entry}))
    with pytest.raises(WeightsError, match=message):
        read_bundle(tmp_path / "b")


# The table in an index.


def test_the_checksum_of_the_published_check_value():
    # CRC-32C (RFC 3720) of "123456789" is E3069283; LevelDB's doc/table_format.md masks it.
    rotated = (0xE3069283 >> 15 | 0xE3069283 << 17) & 0xFFFFFFFF
    assert masked_crc32c(b"123456789") == (rotated + 0xA282EAD8) & 0xFFFFFFFF


@example({})
@example({"": b"only"})
@given(st.dictionaries(st.text(max_size=9), st.binary(max_size=200), max_size=40))
def test_every_entry_of_a_table_is_read(entries: dict[str, bytes]):
    in_order = {key.encode(): entries[key] for key in sorted(entries)}
    assert [*read_table(table(in_order))] == [*in_order.items()]


def test_keys_that_share_their_beginning_in_a_table_of_tensorflow():
    names = [name for name, _ in read_table((DATA / "tiny/model.ckpt.index").read_bytes())]
    assert len(names) == 29
    assert names == sorted(names)
    assert [name for name, _ in read_table(TABLE)] == [
        b"",
        b"bfloat16",
        b"double",
        b"half",
        b"scalar",
    ]


def test_several_blocks_and_keys_that_share_their_beginning():
    first = b"\0\4\1mode1" + b"\4\2\2ls23" + b"\3\1\0x"
    assert [*read_table(table_of_blocks(first, b"\0\1\1n4", b""))] == [
        (b"mode", b"1"),
        (b"models", b"23"),
        (b"modx", b""),
        (b"n", b"4"),
    ]


def test_any_flipped_bit_of_a_table_is_noticed():
    for place in range(len(TABLE)):
        for bit in range(8):
            flipped = bytearray(TABLE)
            flipped[place] ^= 1 << bit
            with pytest.raises(ValueError, match="copy or download it again"):
                dict(read_table(bytes(flipped)))


def test_any_missing_bytes_of_a_table_are_noticed():
    for place in range(len(TABLE)):
        for cut in (TABLE[:place], TABLE[place + 1 :], TABLE[:place] + TABLE[place + 1 :]):
            with pytest.raises(ValueError, match="copy or download it again"):
                dict(read_table(cut))


def test_a_compressed_table():
    with pytest.raises(ValueError, match=r"the block at byte \d+ is compressed; save it uncompr"):
        dict(read_table(table_of_blocks(b"", compression=1)))


@example(b"\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\1\0")  # a key of 2**64 − 1 bytes
@given(st.binary(max_size=20))
def test_nonsense_in_a_table_under_a_right_checksum(entries: bytes):
    with suppress(ValueError):  # and nothing else
        dict(read_table(table_of_blocks(entries)))


# Small files that claim much.


def test_an_endless_integer():
    with pytest.raises(ValueError, match="an integer has too many bytes"):
        [*read_table(table_of_blocks(b"\xff" * 200_000))]


def test_names_that_share_ever_longer_beginnings():
    entries = b"".join(varint(500 * n) + varint(500) + b"\0" + b"a" * 500 for n in range(99))
    with pytest.raises(ValueError, match="a name is longer than 1024 bytes"):
        [*read_table(table_of_blocks(entries))]
    with pytest.raises(ValueError, match="a name is longer than"):
        [*read_table(table_of_blocks(varint(7) + varint(1) + b"\0a"))]


def test_many_references_to_one_block():
    with pytest.raises(ValueError, match="the blocks overlap at byte 0"):
        [*read_table(table_of_blocks(entry(b"a", b"b" * 100), repeats=20_000))]


def test_tensors_that_share_bytes(tmp_path: Path):
    write_bundle(tmp_path / "model", {"a": torch.zeros(4), "b": torch.zeros(4)})
    index = tmp_path / "model.index"
    raw = table(
        {
            key: value.replace(b"\x20\x10", b"\x20\x00")
            for key, value in read_table(index.read_bytes())
        }
    )
    index.write_bytes(raw)
    with pytest.raises(WeightsError, match="b overlaps another tensor"):
        read_bundle(tmp_path / "model")
