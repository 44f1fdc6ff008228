"""Reads JSON, safetensors and PyTorch files, without running code that a file may contain."""

import json
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

import torch
from torch import Tensor

from clean_transformer.weights.refusals import AGAIN, WeightsError
from clean_transformer.weights.table import State

# The keys under which training scripts usually save a state dict, next to their optimizer's state.
# If a file has several of them, the first counts.
WRAPPERS = ("model_state_dict", "state_dict", "model")


def read_json(file: Path) -> dict[str, Any]:
    """Return the fields of the JSON object in `file`. Raises `WeightsError` for a damaged file."""
    return parse_json(file, readable(file).read_bytes())


def parse_json(file: Path, content: bytes) -> dict[str, Any]:
    """Return the fields of the JSON object in `content`. Error messages name `file`.

    Raises `WeightsError` for bytes that are not a JSON object, for a key that occurs twice, and for
    lists or objects that are nested too deeply for Python.
    """
    try:
        fields = json.loads(content.decode("utf-8"), object_pairs_hook=_without_repeats)
    except RecursionError:
        raise WeightsError(f"{file} is nested too deeply; {AGAIN}") from None
    except ValueError as error:
        raise WeightsError(f"{file} is not JSON ({error}); {AGAIN}") from None
    if not isinstance(fields, dict):
        raise WeightsError(f"{file} is not a JSON object; {AGAIN}")
    return fields


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"the key {shorten(key)} occurs twice")
        fields[key] = value
    return fields


def readable(file: Path) -> Path:
    """Return `file`. Raises `WeightsError` if we have no permission to read the file."""
    try:
        file.open("rb").close()
    except (PermissionError, IsADirectoryError) as error:
        raise WeightsError(f"{file} may not be read ({error.strerror})") from None
    return file


def read_tensors(file: Path) -> dict[str, Any]:
    """Return the dictionary in a .safetensors file, or in a file that `torch.save` wrote.

    The tensors in the dictionary are memory-mapped, unless PyTorch before 1.6 wrote the file.
    Raises `WeightsError` for a damaged file, for a file that does not contain a dictionary, and for
    a file with pickled objects that could run code.
    """
    readable(file)
    saved = _read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    if not isinstance(saved, dict):
        raise WeightsError(f"{file} contains a {type(saved).__name__}, not a state dict")
    return saved


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, RuntimeError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{file} is damaged ({_reason(error)}); {AGAIN}") from None
    with file.open("rb") as opened:  # safetensors reads a key that occurs twice without an error
        parse_json(file, opened.read(int.from_bytes(opened.read(8), "little")))
    return tensors


def read_pickle(file: Path) -> Any:
    """Return what `torch.save` wrote to `file`, with memory-mapped tensors (see `read_tensors`)."""
    with file.open("rb") as opened:
        is_zip = opened.read(2) == b"PK"  # before PyTorch 1.6, torch.save wrote no zip files
    records = _checked_records(file) if is_zip else {}
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # an altered pickle can raise every kind of exception
        raise WeightsError(_refusal(file, error)) from None
    _refuse_long_storages(file, saved, records)
    return saved


def _checked_records(file: Path) -> dict[int, int]:
    """Verify all checksums in a zip file, and return the sizes of the records in bytes.

    A record is one file inside the zip file. The keys of the result are the offsets of the records'
    data in the zip file, in bytes.
    """
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as opened:
            if damaged := archive.testzip():
                raise WeightsError(f"{file} is damaged in its record {damaged}; {AGAIN}")
            records = {}
            for record in archive.infolist():
                # A zip file's local header has 30 bytes, then a name and an extra field.
                opened.seek(record.header_offset + 26)
                lengths = opened.read(4)
                name, extra = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
                records[record.header_offset + 30 + name + extra] = record.file_size
            return records
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{file} is damaged ({_reason(error)}); {AGAIN}") from None
    except RuntimeError:  # zipfile's error for encryption
        raise WeightsError(f"{file} is encrypted; {AGAIN}") from None


def _refuse_long_storages(file: Path, saved: Any, records: dict[int, int]) -> None:
    """Raise `WeightsError` if the data of a tensor in `file` is cut off."""
    # `torch.load` does not compare the size of a tensor with the size of its record when it maps a
    # file into memory. All tensors lie in one mapping, which begins at an unknown address, but the
    # distances between tensors are the distances between their records.
    storages = {
        tensor.untyped_storage().data_ptr(): (key, tensor.untyped_storage().nbytes())
        for key, tensor in _tensors_in(saved)
        if tensor.untyped_storage().nbytes()
    }
    if not (records and storages):
        return
    first = min(storages)
    starts = [
        first - offset
        for offset in records
        if (first - offset) % 4096 == 0 and all(p - first + offset in records for p in storages)
    ]
    for start in starts:
        long = [key for p, (key, size) in storages.items() if size > records[p - start]]
        if not long:
            return
    named = [key for key, _ in storages.values()] if not starts else long
    raise WeightsError(f"{file} is damaged: the data of {shorten(named[0])} is cut off; {AGAIN}")


def _tensors_in(saved: Any) -> Iterator[tuple[Any, Tensor]]:
    """Yield each dense tensor in nested dictionaries and lists, with its key."""
    left: list[tuple[Any, Any]] = [("", saved)]
    seen: set[int] = set()
    while left:
        key, value = left.pop()
        if isinstance(value, Tensor) and value.layout == torch.strided:
            yield key, value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))  # a dictionary in a pickle can contain itself
            keys = value if isinstance(value, dict) else range(len(value))
            items = value.values() if isinstance(value, dict) else value
            left += zip(keys, items, strict=True)


def _refusal(file: Path, error: Exception) -> str:
    """Return the message of the `WeightsError` that replaces an exception of `torch.load`."""
    message = str(error)
    if "legacy .tar format" in message:
        return f"{file} was written by PyTorch 0.1; load it there, and save its state dict again"
    if isinstance(error, pickle.UnpicklingError) and (
        named := re.search(r"GLOBAL ([\w.]+)|(?:class|callable|function) ([\w.]+)", message)
    ):
        name = named[1] or named[2]
        module, _, last = name.rpartition(".")
        # Python 2 had `commands` and `__builtin__`, whose names old pickles still use.
        library = {*sys.stdlib_module_names, "commands", "__builtin__"}
        if last[:1].isupper() and module.partition(".")[0] not in library - {"__main__"}:
            return (
                f"{file} contains a whole Python object of the class {name}, not a state dict; "
                "save only its state dict: torch.save(model.state_dict(), file)"
            )
        return (
            f"{file} wants to run code when it is read: it calls {name}; if the file is yours, "
            "save only the state dict: torch.save(model.state_dict(), file); otherwise, ask for "
            "the weights as safetensors"
        )
    return f"{file} is damaged ({_reason(error)}); {AGAIN}"


def _reason(error: Exception) -> str:
    """Return the first line of an error's message, without characters that cannot be printed."""
    if isinstance(error, pickle.UnpicklingError) or not str(error):
        return "its pickled part cannot be read"
    line = str(error).splitlines()[0]
    return "".join(character for character in line if character.isprintable())[:200]


def _wrapped(saved: Any) -> Any:
    """Return the state dict that `saved` has under one of its keys, or else `saved`.

    The keys in `WRAPPERS` come first. Under any other key, a state dict counts if it is the only
    state dict in `saved`.
    """
    inside = {
        key: value
        for key, value in saved.items()
        if isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values())
    }
    usual = [inside[key] for key in WRAPPERS if key in inside]
    return next(iter(usual or inside.values())) if usual or len(inside) == 1 else saved


def state_dict_in(file: Path, saved: Mapping[str, Any]) -> State:
    """Return the state dict in `saved`, the dictionary that was read from `file`.

    Training scripts save the state dict under a key such as "state_dict". If `saved` has no such
    key, `saved` itself is the state dict. Raises `WeightsError` if the state dict contains anything
    but tensors.
    """
    state = _wrapped(saved)
    others = [
        key
        for key, value in state.items()
        if not isinstance(value, Tensor) or not isinstance(key, str)
    ]
    if others:
        raise WeightsError(
            f"{file} is not a state dict: {shorten(others[:3])} are not tensors; "
            "load the file with torch.load and pass its state dict to from_state_dict"
        )
    return dict(state)
