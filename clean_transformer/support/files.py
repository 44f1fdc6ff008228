"""Writes files atomically: other programs see the old file or the complete new file."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_folder(*files: Path | None) -> None:
    """Raise `FileNotFoundError` if the folder of one of `files` does not exist.

    Entries of `files` that are None are ignored. Call this function before a long computation whose
    results will be saved in these files.
    """
    for file in files:
        if file is not None and not file.parent.is_dir():
            folder = str(file.parent)
            raise FileNotFoundError(f"no folder {folder!r} for {file.name!r}; make it first")


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yield the path of a temporary file next to `file`, for the caller to write.

    If the `with` block ends without an error, the temporary file is renamed to `file`. Otherwise
    the temporary file is deleted, and `file` stays as it was.
    """
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete the temporary files that killed processes left in `folder`; see `atomic_file`.

    Call this function only while no other process writes files to `folder`.
    """
    for unfinished in folder.glob(".*.unfinished"):
        unfinished.unlink()


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write `content` to `file` atomically, with `atomic_file`. A `str` is written as UTF-8."""
    with atomic_file(file) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield the path of a temporary folder, for the caller to write files into.

    If the `with` block ends without an error, the files are moved into `folder`, one by one.
    Otherwise no file is moved. Files in `folder` with other names stay as they are. `folder` is
    created if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as unfinished:
        yield Path(unfinished)
        for file in sorted(Path(unfinished).iterdir()):
            os.replace(file, folder / file.name)
