from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clean_transformer.weights.formats.leveldb import masked_crc32c, read_table, varint, write_table

DATA = Path(__file__).parent / "data"  # written by TensorFlow
TABLES = [(DATA / name).read_bytes() for name in ("shards.index", "tiny/model.ckpt.index")]


def made_of(*blocks: bytes, compression: int = 0) -> bytes:
    """A table of these blocks of entries, with every checksum right."""
    table = b""

    def append(entries: bytes) -> bytes:
        nonlocal table
        block = entries + (0).to_bytes(4, "little") + (1).to_bytes(4, "little")  # one restart
        place = varint(len(table)) + varint(len(block))
        block += bytes([compression])
        table += block + masked_crc32c(block).to_bytes(4, "little")
        return place

    places = [append(entries) for entries in blocks]
    metaindex = append(b"")
    index = append(b"".join(b"\0\0" + bytes([len(place)]) + place for place in places))
    return table + (metaindex + index).ljust(40, b"\0") + TABLES[0][-8:]


def test_the_checksum_of_the_published_check_value():
    # CRC-32C (RFC 3720) of "123456789" is E3069283; LevelDB's doc/table_format.md masks it.
    rotated = (0xE3069283 >> 15 | 0xE3069283 << 17) & 0xFFFFFFFF
    assert masked_crc32c(b"123456789") == (rotated + 0xA282EAD8) & 0xFFFFFFFF


@given(st.integers(0, 2**64))
def test_seven_bits_of_a_number_in_each_byte(number: int):
    encoded = varint(number)
    assert sum(byte % 128 << 7 * place for place, byte in enumerate(encoded)) == number
    assert [byte >= 128 for byte in encoded] == [True] * (len(encoded) - 1) + [False]


@example({})
@example({"": b"only"})
@given(st.dictionaries(st.text(max_size=9), st.binary(max_size=200), max_size=40))
def test_what_is_written_is_read(entries: dict[str, bytes]):
    in_order = {key.encode(): entries[key] for key in sorted(entries)}
    assert dict(read_table(write_table(in_order))) == in_order


@pytest.mark.parametrize(("table", "length"), [(TABLES[0], 5), (TABLES[1], 29)])
def test_tensorflows_tables_are_written_byte_for_byte(table: bytes, length: int):
    entries = dict(read_table(table))
    assert len(entries) == length
    assert write_table(entries) == table


def test_several_blocks_and_keys_that_share_their_beginning():
    first = b"\0\4\1mode1" + b"\4\2\2ls23" + b"\3\1\0x"
    table = made_of(first, b"\0\1\1n4", b"")
    assert [*read_table(table)] == [
        (b"mode", b"1"),
        (b"models", b"23"),
        (b"modx", b""),
        (b"n", b"4"),
    ]


def test_any_flipped_bit_is_noticed():
    for place in range(len(TABLES[0])):
        for bit in range(8):
            flipped = bytearray(TABLES[0])
            flipped[place] ^= 1 << bit
            with pytest.raises(ValueError, match="copy or download it again"):
                dict(read_table(bytes(flipped)))


def test_any_missing_bytes_are_noticed():
    for place in range(len(TABLES[0])):
        for cut in (
            TABLES[0][:place],
            TABLES[0][place + 1 :],
            TABLES[0][:place] + TABLES[0][place + 1 :],
        ):
            with pytest.raises(ValueError, match="copy or download it again"):
                dict(read_table(cut))


def test_a_compressed_table():
    with pytest.raises(ValueError, match=r"its block at byte \d+ is compressed; save it uncompr"):
        dict(read_table(made_of(b"", compression=1)))


@example(b"\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\1\0")  # a key of 2**64 − 1 bytes
@given(st.binary(max_size=20))
def test_nonsense_under_a_right_checksum(entries: bytes):
    with suppress(ValueError):  # and nothing else
        dict(read_table(made_of(entries)))
