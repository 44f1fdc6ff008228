"""Writing files so that a reader sees the old one or the new one, never half of one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_folder(file: Path) -> None:
    """Raise `FileNotFoundError` unless there is a folder for it: ask before the work it holds."""
    if not file.parent.is_dir():
        raise FileNotFoundError(f"no folder {str(file.parent)!r} for {file.name!r}; make it first")


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A file beside it to write, which is put in its place at the end, unless an error comes."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed left of `atomic_file`; nobody may be writing there."""
    for unfinished in folder.glob(".*.unfinished"):
        unfinished.unlink()


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write the content, text as UTF-8, beside the file, then put it in the file's place."""
    with atomic_file(file) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to write files in, which then take their places in `folder` one by one.

    If the writing breaks off, none of them does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as unfinished:
        yield Path(unfinished)
        for file in sorted(Path(unfinished).iterdir()):
            os.replace(file, folder / file.name)
