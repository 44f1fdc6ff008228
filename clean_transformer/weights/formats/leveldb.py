"""Tables of sorted keys with their values, as LevelDB has them, in whole files and uncompressed.

LevelDB's doc/table_format.md describes them: blocks of entries, of which one, the index, has the
places of the others, and a footer with the place of the index. Every block has a checksum.
"""

from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import takewhile
from operator import eq
from typing import Any

FOOTER_SIZE = 48


MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")


RESTART_INTERVAL = 16  # so many entries in a row leave out what their key shares with the last one


AGAIN = "copy or download it again"


def read_table(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values, in order.

    Raises `ValueError` if any byte is not as it was written, and for a compressed table.
    """
    footer = BytesIO(table[-FOOTER_SIZE:])
    metaindex, index = _read_place(footer), _read_place(footer)
    if footer.getvalue() != _footer(metaindex, index):
        raise ValueError(f"the file does not end as one; {AGAIN}")
    _read_block(table, metaindex)  # empty, and read for its checksum
    for _, place in _entries(_read_block(table, index)):
        yield from _entries(_read_block(table, _read_place(BytesIO(place))))


def write_table(entries: Mapping[bytes, bytes]) -> bytes:
    """The table, with its entries in one block; their keys, of UTF-8, must be in order."""
    table = b""

    def append(block: bytes) -> tuple[int, int]:
        nonlocal table
        place = len(table), len(block)
        block += b"\0"  # not compressed
        table += block + masked_crc32c(block).to_bytes(4, "little")
        return place

    place = append(_block(entries, RESTART_INTERVAL))
    metaindex = append(_block({}))
    # The index may have any key that is not before the last one; LevelDB takes a shortest.
    after = bytes(byte + 1 for byte in max(entries, default=b"")[:1])
    index = append(_block({after: _place(place)}))
    return table + _footer(metaindex, index)


def masked_crc32c(data: Any) -> int:
    """The checksum of bytes, or of an array of them. LevelDB rotates a CRC-32C and adds to it."""
    from google_crc32c import value

    crc = value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def read_varint(stream: BytesIO) -> int:
    """A number written 7 bits to a byte, the lowest first; the last byte is below 128."""
    number = shift = 0
    while True:
        (byte,) = take(stream, 1)
        number |= byte % 128 << shift
        shift += 7
        if byte < 128:
            return number


def varint(number: int) -> bytes:
    """The bytes of which `read_varint` makes the number."""
    low, high = number % 128, number >> 7
    return bytes([low + 128]) + varint(high) if high else bytes([low])


def take(stream: BytesIO, count: int) -> bytes:
    """The next bytes, of which there must be as many."""
    if count > len(stream.getbuffer()) - stream.tell():
        raise ValueError(f"it ends too soon; {AGAIN}")
    return stream.read(count)


def _read_block(table: bytes, place: tuple[int, int]) -> bytes:
    offset, size = place
    end = offset + size
    block, compression, checksum = table[offset:end], table[end : end + 1], table[end + 1 : end + 5]
    if masked_crc32c(block + compression) != int.from_bytes(checksum, "little"):
        raise ValueError(f"the checksum of its block at byte {offset} is wrong; {AGAIN}")
    if compression != b"\0":
        raise ValueError(f"its block at byte {offset} is compressed; save it uncompressed")
    return block


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    n_restarts = int.from_bytes(block[-4:], "little")
    entries, key = BytesIO(block[: -4 * (n_restarts + 1)]), b""
    while entries.tell() < len(entries.getbuffer()):
        shared, rest, size = (read_varint(entries) for _ in range(3))
        key = key[:shared] + take(entries, rest)
        yield key, take(entries, size)


def _block(entries: Mapping[bytes, bytes], restart_interval: int = 1) -> bytes:
    """The entries, then the places of those with a whole key, and how many places these are."""
    block, restarts, last = b"", [], b""
    for number, (key, value) in enumerate(entries.items()):
        if number % restart_interval == 0:
            restarts.append(len(block))
            last = b""
        shared = sum(takewhile(bool, map(eq, last, key)))
        block += varint(shared) + varint(len(key) - shared) + varint(len(value))
        block += key[shared:] + value
        last = key
    restarts = restarts or [0]
    return block + b"".join(place.to_bytes(4, "little") for place in (*restarts, len(restarts)))


def _read_place(stream: BytesIO) -> tuple[int, int]:
    return read_varint(stream), read_varint(stream)


def _place(place: tuple[int, int]) -> bytes:
    return varint(place[0]) + varint(place[1])


def _footer(metaindex: tuple[int, int], index: tuple[int, int]) -> bytes:
    places = _place(metaindex) + _place(index)
    return places.ljust(FOOTER_SIZE - len(MAGIC), b"\0") + MAGIC
