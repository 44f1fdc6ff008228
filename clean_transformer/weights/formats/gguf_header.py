"""Checks the header of a GGUF file before the gguf package reads the file.

The gguf package does not check the lengths in the header. In a damaged file, a wrong length can
make the package loop for hours. Source of the format: docs/gguf.md in the repository ggml-org/ggml.
"""

from pathlib import Path
from typing import Any, BinaryIO

# The size in bytes of each metadata type with a fixed size, by its number in GGUF.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


STRING, ARRAY = 8, 9


# The largest header that we read. GPT-2's header has 2 MB, most of it the tokenizer.
MAX_HEADER = 64 * 2**20


# The most elements that we read from an array of numbers, which the gguf package reads one by one.
MAX_ARRAY = 2**20


def check_header(file: Path) -> None:
    """Raise `ValueError` if the header is damaged.

    The header is damaged, for example, if it lists more data than the file has, or a key twice.
    """
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError("it does not begin as a GGUF file")
        limit = min(file.stat().st_size, MAX_HEADER)
        version = _number(stream, 4, limit)
        if version not in (2, 3):
            raise ValueError(f"it has the version {version}, and only 2 and 3 are known")
        n_tensors, n_fields = _number(stream, 8, limit), _number(stream, 8, limit)
        names: set[bytes] = set()
        for _ in range(n_fields):
            _new(names, _string(stream, limit))
            _skip_value(stream, _number(stream, 4, limit), limit)
        for _ in range(n_tensors):
            _new(names, b"tensor " + _string(stream, limit))
            n_dims = _number(stream, 4, limit)
            if n_dims > 4:
                raise ValueError(f"a tensor has {n_dims} axes")
            _skip(stream, 8 * n_dims + 4 + 8, limit)


def check_tensors(reader: Any, size: int) -> None:
    """Raise `ValueError` if a tensor overlaps another, is not aligned, or is cut off.

    `reader` is the gguf package's `GGUFReader`. `size` is the size of the file in bytes.
    """
    end = 0
    for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
        start, n_bytes = int(tensor.data_offset), int(tensor.n_bytes)
        if start < end:
            raise ValueError(f"the tensor {tensor.name!r} overlaps another tensor")
        if start % reader.alignment:
            raise ValueError(f"the tensor {tensor.name!r} is not aligned to {reader.alignment}")
        end = start + n_bytes
        if end > size:
            raise ValueError(f"the tensor {tensor.name!r} ends after the file")


def _new(names: set[bytes], name: bytes) -> None:
    if name in names:
        raise ValueError(f"{name.decode(errors='backslashreplace')!r} occurs twice")
    names.add(name)


def _skip_value(stream: BinaryIO, kind: int, limit: int) -> None:
    if kind == STRING:
        _string(stream, limit)
    elif kind == ARRAY:
        element, length = _number(stream, 4, limit), _number(stream, 8, limit)
        if element == STRING:
            for _ in range(length):
                _string(stream, limit)
        elif element in SIZES and length <= MAX_ARRAY:
            _skip(stream, length * SIZES[element], limit)
        else:
            raise ValueError(f"an array has {length} elements of the type {element}")
    elif kind in SIZES:
        _skip(stream, SIZES[kind], limit)
    else:
        raise ValueError(f"a field has the unknown type {kind}")


def _string(stream: BinaryIO, limit: int) -> bytes:
    length = _number(stream, 8, limit)
    _fits(stream, length, limit)
    return stream.read(length)


def _number(stream: BinaryIO, size: int, limit: int) -> int:
    _fits(stream, size, limit)
    return int.from_bytes(stream.read(size), "little")


def _skip(stream: BinaryIO, length: int, limit: int) -> None:
    _fits(stream, length, limit)
    stream.seek(length, 1)


def _fits(stream: BinaryIO, length: int, limit: int) -> None:
    if stream.tell() + length > limit:
        raise ValueError("its header is longer than the file, or than any header of GPT-2")
