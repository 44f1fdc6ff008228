"""TensorFlow's checkpoints of version 2, tensor bundles, read and written without TensorFlow.

`PREFIX.index` is a LevelDB table. It gives the name of each tensor a message with its dtype, its
shape, and the place of its bytes in `PREFIX.data-SHARD-of-SHARDS`; and the empty name one on the
whole. TensorFlow's tensor_bundle.proto describes the messages, protobuf.dev how they are encoded.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clean_transformer.weights.formats.leveldb import (
    AGAIN,
    masked_crc32c,
    read_table,
    read_varint,
    take,
    varint,
    write_table,
)
from clean_transformer.weights.table import WeightsError

# The floating-point types by their number in TensorFlow's types.proto.
DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}


NUMBERS = {dtype: number for number, dtype in DTYPES.items()}


class Wire(IntEnum):
    """How the value of a field is written: the three ways that these messages use."""

    VARINT = 0
    BYTES = 2
    FIXED32 = 5


# A field's tag is 8 × its number + how its value is written.
# BundleHeaderProto, and its VersionDef:
N_SHARDS = 8 * 1 + Wire.VARINT


ENDIANNESS = 8 * 2 + Wire.VARINT


VERSION = 8 * 3 + Wire.BYTES


PRODUCER = 8 * 1 + Wire.VARINT


# BundleEntryProto:
DTYPE = 8 * 1 + Wire.VARINT


SHAPE = 8 * 2 + Wire.BYTES


SHARD = 8 * 3 + Wire.VARINT


OFFSET = 8 * 4 + Wire.VARINT


SIZE = 8 * 5 + Wire.VARINT


CHECKSUM = 8 * 6 + Wire.FIXED32


SLICES = 8 * 7 + Wire.BYTES


# TensorShapeProto, and its Dim:
DIM = 8 * 2 + Wire.BYTES


LENGTH = 8 * 1 + Wire.VARINT


@dataclass(frozen=True)
class Entry:
    """What the index says of one tensor; `dtype` is TensorFlow's number for it."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    in_slices: bool = False


def read_bundle(prefix: Path) -> dict[str, Tensor]:
    """Every tensor, as a view of the memory-mapped file wherever its offset allows that.

    Raises `FileNotFoundError` for a missing file. Raises `WeightsError`, naming the tensor or the
    index, for one that is damaged, for a tensor saved in slices, and for a dtype not in `DTYPES`.
    """
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
    tensors = {}
    for name, entry in entries.items():
        raw = mapped[entry.shard][entry.offset : entry.offset + entry.size]
        if masked_crc32c(raw.numpy()) != entry.checksum:
            raise WeightsError(f"{files[entry.shard]} is damaged in {name}; {AGAIN}")
        dtype = DTYPES[entry.dtype]
        aligned = raw if entry.offset % dtype.itemsize == 0 else raw.clone()
        tensors[name] = aligned.view(dtype).reshape(entry.shape)
    return tensors


def write_bundle(prefix: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors, in one shard, byte for byte as TensorFlow does.

    Raises `WeightsError` for a dtype that is not in `DTYPES`, before writing.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in NUMBERS:
            raise WeightsError(f"{name} is {tensor.dtype}; convert it to one of {[*NUMBERS]}")
    index = {b"": _encode((N_SHARDS, 1), (VERSION, _encode((PRODUCER, 1))))}
    with prefix.with_name(f"{prefix.name}.data-00000-of-00001").open("wb") as data:
        for name, tensor in sorted(tensors.items()):
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            dims = [(DIM, _encode((LENGTH, length))) for length in tensor.shape]
            index[name.encode()] = _encode(
                (DTYPE, NUMBERS[tensor.dtype]),
                (SHAPE, _encode(*dims)),
                (OFFSET, data.tell()),
                (SIZE, len(raw)),
                (CHECKSUM, masked_crc32c(raw)),
            )
            data.write(raw.data)
    prefix.with_name(f"{prefix.name}.index").write_bytes(write_table(index))


def _refuse_missing(files: Iterable[Path]) -> None:
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"there is no {' and no '.join(missing)}; {AGAIN}")


def _read_index(file: Path) -> tuple[int, dict[str, Entry]]:
    """The number of shards, and the entry of each tensor that can be read."""
    try:
        messages = {name: _decode(message) for name, message in read_table(file.read_bytes())}
        entries = {
            name.decode(errors="backslashreplace"): _entry(message)
            for name, message in messages.items()
            if name
        }
    except ValueError as error:
        raise WeightsError(f"{file} cannot be read as TensorFlow's index: {error}") from None
    header = messages.get(b"", {})
    if _number(header, ENDIANNESS):
        raise WeightsError(f"{file} is of a big-endian machine; save it on a little-endian one")
    n_shards = _number(header, N_SHARDS)
    for name, entry in entries.items():
        if entry.in_slices:
            raise WeightsError(f"{file} has {name} in slices; save it whole")
        if entry.dtype not in DTYPES:
            raise WeightsError(
                f"{file} has {name} with DataType {entry.dtype}, which is not floating-point; "
                "save the weights without it"
            )
        size = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if entry.size != size or entry.shard >= n_shards:
            raise WeightsError(f"{file} contradicts itself on {name}; {AGAIN}")
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


# Protobuf messages.


def _decode(message: bytes) -> dict[int, list[Any]]:
    """The values of every field, by its tag. Raises `ValueError` for what is no message."""
    stream = BytesIO(message)
    fields: dict[int, list[Any]] = {}
    while stream.tell() < len(message):
        tag = read_varint(stream)
        match tag % 8:
            case Wire.VARINT:
                value: Any = read_varint(stream)
            case Wire.BYTES:
                value = take(stream, read_varint(stream))
            case Wire.FIXED32:
                value = int.from_bytes(take(stream, 4), "little")
            case _:
                raise ValueError(f"it has a field with the unknown tag {tag}; {AGAIN}")
        fields.setdefault(tag, []).append(value)
    return fields


def _number(fields: Mapping[int, list[Any]], tag: int) -> int:
    """The last of a field's values; 0 if it has none, as zeros are left out."""
    return fields.get(tag, [0])[-1]


def _encode(*fields: tuple[int, int | bytes]) -> bytes:
    """The message with these tags and values."""
    message = b""
    for tag, value in fields:
        if isinstance(value, bytes):
            message += varint(tag) + varint(len(value)) + value
        elif value:
            fixed = tag % 8 == Wire.FIXED32
            message += varint(tag) + (value.to_bytes(4, "little") if fixed else varint(value))
    return message
