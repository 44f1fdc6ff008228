"""Reads TensorFlow's checkpoints (version 2, "tensor bundles") without TensorFlow.

A bundle has an index file, `PREFIX.index`, and one or more data files (shards),
`PREFIX.data-SHARD-of-SHARDS`. The index is a LevelDB table: it maps the name of each tensor to a
protobuf message with the tensor's dtype, shape, place in a data file, and checksum. The index also
maps the empty name to a message about the whole bundle.

Sources: TensorFlow's tensor_bundle.proto (the messages), protobuf.dev (the encoding of messages),
LevelDB's doc/table_format.md (the table).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clean_transformer.weights.formats.crc32c import crc32c_library, masked_crc32c
from clean_transformer.weights.refusals import AGAIN, WeightsError

# The dtypes that this module can read, by their numbers in TensorFlow's types.proto.
DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}

# The longest name of a tensor that we read, in bytes. Each name may share its beginning with the
# name before, so a small file could otherwise hold many long names.
MAX_NAME = 1024


class Wire(IntEnum):
    """The wire types of protobuf that TensorFlow uses: they say how a field's value is encoded."""

    VARINT = 0
    BYTES = 2
    FIXED32 = 5


# Each field of an encoded message begins with its tag: 8 × the field's number + its wire type.
# The tags of fields in BundleHeaderProto, the message about the whole bundle:
N_SHARDS = 8 * 1 + Wire.VARINT
ENDIANNESS = 8 * 2 + Wire.VARINT
# The tags of fields in BundleEntryProto, the message about one tensor:
DTYPE = 8 * 1 + Wire.VARINT
SHAPE = 8 * 2 + Wire.BYTES
SHARD = 8 * 3 + Wire.VARINT
OFFSET = 8 * 4 + Wire.VARINT
SIZE = 8 * 5 + Wire.VARINT
CHECKSUM = 8 * 6 + Wire.FIXED32
SLICES = 8 * 7 + Wire.BYTES
# The tag of `dim` in TensorShapeProto, and the tag of `size` in TensorShapeProto.Dim:
DIM = 8 * 2 + Wire.BYTES
LENGTH = 8 * 1 + Wire.VARINT

# The last 48 bytes of a LevelDB table are its footer. The first 40 bytes of the footer hold the
# places (see `_read_place`) of two blocks, and then zeros. The last 8 bytes are MAGIC.
FOOTER_SIZE = 48
MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")


@dataclass(frozen=True)
class Entry:
    """The description of one tensor in the index file of a TensorFlow checkpoint.

    `dtype` is TensorFlow's number for the dtype. `shard` is the number of the data file that
    contains the tensor. In this data file, the tensor begins at byte `offset` and has `size` bytes.
    `checksum` is `masked_crc32c` of these bytes. `in_slices` is True if the tensor was saved in
    several pieces (slices), which this module cannot read.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    in_slices: bool


def read_bundle(prefix: Path) -> dict[str, Tensor]:
    """Return every tensor of a TensorFlow checkpoint, by name.

    `prefix` is the path of the checkpoint's files without their endings. The tensors are
    memory-mapped, but a tensor is copied if its offset in the data file is not a multiple of its
    item size.

    Raises `FileNotFoundError` for a missing file. Raises `WeightsError` for a damaged tensor or
    index, for a tensor that was saved in several pieces (slices), for a dtype that is not
    floating-point, and if the package google-crc32c is not installed.
    """
    crc32c_library()
    index = prefix.with_name(f"{prefix.name}.index")
    _refuse_missing([index])
    n_shards, entries = _read_index(index)
    files = {
        shard: prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{n_shards:05}")
        for shard in sorted({entry.shard for entry in entries.values()})
    }
    _refuse_missing(files.values())
    mapped = {
        shard: torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
        for shard, file in files.items()
    }
    _refuse_overlaps(index, entries)
    tensors = {}
    for name, entry in entries.items():
        raw = mapped[entry.shard][entry.offset : entry.offset + entry.size]
        if masked_crc32c(raw.numpy()) != entry.checksum:
            raise WeightsError(f"{files[entry.shard]} is damaged in {name}; {AGAIN}")
        dtype = DTYPES[entry.dtype]
        aligned = raw if entry.offset % dtype.itemsize == 0 else raw.clone()
        tensors[name] = aligned.view(dtype).reshape(entry.shape)
    return tensors


def _refuse_overlaps(index: Path, entries: Mapping[str, Entry]) -> None:
    """Raise `WeightsError` if two tensors share bytes of a data file."""
    ends: dict[int, int] = {}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset < ends.get(entry.shard, 0):
            raise WeightsError(f"{index}: {name} overlaps another tensor; {AGAIN}")
        ends[entry.shard] = entry.offset + entry.size


def _refuse_missing(files: Iterable[Path]) -> None:
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"there is no {' and no '.join(missing)}; {AGAIN}")


def _read_index(file: Path) -> tuple[int, dict[str, Entry]]:
    """Return the number of data files (shards), and the `Entry` of each tensor, by name.

    `file` is the index file of a TensorFlow checkpoint. Raises `WeightsError` for a damaged index,
    for a tensor that was saved in several pieces, and for a dtype that is not floating-point.
    """
    try:
        messages: dict[bytes, dict[int, list[Any]]] = {}
        for key, message in read_table(file.read_bytes()):
            if key in messages:
                raise ValueError(f"{key.decode(errors='backslashreplace')} occurs twice; {AGAIN}")
            messages[key] = _decode(message)
        entries = {
            key.decode(errors="backslashreplace"): _entry(message)
            for key, message in messages.items()
            if key
        }
    except ValueError as error:
        raise WeightsError(f"{file} is not a valid TensorFlow index: {error}") from None
    header = messages.get(b"", {})
    if _number(header, ENDIANNESS):
        raise WeightsError(
            f"{file} is from a big-endian machine; save the model on a little-endian one"
        )
    n_shards = _number(header, N_SHARDS)
    for name, entry in entries.items():
        if entry.in_slices:
            raise WeightsError(f"{file}: {name} was saved in slices; save it whole")
        if entry.dtype not in DTYPES:
            raise WeightsError(
                f"{file}: {name} has the DataType {entry.dtype}, which is not floating-point; "
                "save the weights without it"
            )
        size = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if entry.size != size or entry.shard >= n_shards:
            raise WeightsError(f"{file} contradicts itself about {name}; {AGAIN}")
    return n_shards, entries


def _entry(message: Mapping[int, list[Any]]) -> Entry:
    dims = _decode(b"".join(message.get(SHAPE, []))).get(DIM, [])
    return Entry(
        dtype=_number(message, DTYPE),
        shape=tuple(_number(_decode(dim), LENGTH) for dim in dims),
        shard=_number(message, SHARD),
        offset=_number(message, OFFSET),
        size=_number(message, SIZE),
        checksum=_number(message, CHECKSUM),
        in_slices=SLICES in message,
    )


# The functions below decode protobuf messages.


def _decode(message: bytes) -> dict[int, list[Any]]:
    """Decode a protobuf message. Return a list of the values of each field, by the field's tag.

    A tag is 8 × the field's number + its wire type. A list has several values if its field occurs
    several times in the message. Raises `ValueError` if the bytes are not a protobuf message.
    """
    stream = BytesIO(message)
    fields: dict[int, list[Any]] = {}
    while stream.tell() < len(message):
        tag = _read_varint(stream)
        match tag % 8:
            case Wire.VARINT:
                value: Any = _read_varint(stream)
            case Wire.BYTES:
                value = _take(stream, _read_varint(stream))
            case Wire.FIXED32:
                value = int.from_bytes(_take(stream, 4), "little")
            case _:
                raise ValueError(f"a field has the unknown tag {tag}; {AGAIN}")
        fields.setdefault(tag, []).append(value)
    return fields


def _number(fields: Mapping[int, list[Any]], tag: int) -> int:
    """Return the last value of the field with this tag, or 0 if the message lacks the field."""
    return fields.get(tag, [0])[-1]


def _read_varint(stream: BytesIO) -> int:
    """Read an integer in protobuf's varint encoding from the stream, and return it.

    Raises `ValueError` if the integer has more bytes than necessary, or more than 10 bytes, which
    happens only in damaged files.
    """
    # Each byte holds 7 bits of the integer, and the lowest 7 bits come first. The highest bit of
    # each byte is 1 if another byte follows.
    number = shift = 0
    while True:
        (byte,) = _take(stream, 1)
        if (shift and not byte) or shift > 63:
            raise ValueError(f"an integer has too many bytes; {AGAIN}")
        number |= byte % 128 << shift
        shift += 7
        if byte < 128:
            return number


def _take(stream: BytesIO, count: int) -> bytes:
    """Return the next `count` bytes of the stream. Raises `ValueError` if fewer bytes are left."""
    if count > len(stream.getbuffer()) - stream.tell():
        raise ValueError(f"the data ends too soon; {AGAIN}")
    return stream.read(count)


# The functions below read LevelDB tables.


def read_table(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield each key of a LevelDB table and the key's value, in the order of the table.

    Raises `ValueError` if any byte is damaged, and for a compressed table.
    """
    footer = BytesIO(table[-FOOTER_SIZE:])
    metaindex, index = _read_place(footer), _read_place(footer)
    padding = FOOTER_SIZE - len(MAGIC) - footer.tell()
    if footer.read() != bytes(max(padding, 0)) + MAGIC:
        raise ValueError(f"the file does not end as a LevelDB table; {AGAIN}")
    _read_block(table, metaindex)  # this block is empty; we only verify its checksum
    end = 0
    for _, encoded in _entries(_read_block(table, index)):
        place = _read_place(BytesIO(encoded))
        if place[0] < end:  # otherwise a small file could list the same block many times
            raise ValueError(f"the blocks overlap at byte {place[0]}; {AGAIN}")
        end = sum(place)
        yield from _entries(_read_block(table, place))


def _read_place(stream: BytesIO) -> tuple[int, int]:
    """Read where a block of a LevelDB table is. Return the block's offset and size, in bytes."""
    return _read_varint(stream), _read_varint(stream)


def _read_block(table: bytes, place: tuple[int, int]) -> bytes:
    offset, size = place
    end = offset + size
    block, compression, checksum = table[offset:end], table[end : end + 1], table[end + 1 : end + 5]
    if masked_crc32c(block + compression) != int.from_bytes(checksum, "little"):
        raise ValueError(f"the block at byte {offset} has a wrong checksum; {AGAIN}")
    if compression != b"\0":
        raise ValueError(f"the block at byte {offset} is compressed; save it uncompressed")
    return block


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield each key of a block of a LevelDB table, and the key's value.

    For each key, the block stores how many bytes the key shares with the beginning of the previous
    key, and then the rest of the key.
    """
    # The block ends with a list of offsets, for binary search, and the length of this list.
    n_restarts = int.from_bytes(block[-4:], "little")
    entries, key = BytesIO(block[: -4 * (n_restarts + 1)]), b""
    while entries.tell() < len(entries.getbuffer()):
        shared, rest, size = (_read_varint(entries) for _ in range(3))
        if shared > len(key) or shared + rest > MAX_NAME:
            raise ValueError(f"a name is longer than {MAX_NAME} bytes or damaged; {AGAIN}")
        key = key[:shared] + _take(entries, rest)
        yield key, _take(entries, size)
