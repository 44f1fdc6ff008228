"""Writing files so that a reader sees the old one or the new one, never half of one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_folder(*files: Path | None) -> None:
    """Raise `FileNotFoundError` if a file's folder is missing. Call this before long work."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            folder = str(file.parent)
            raise FileNotFoundError(f"no folder {folder!r} for {file.name!r}; make it first")


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yield the path of a temporary file next to `file`, and rename it to `file` on success."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete temporary files of `atomic_file` that killed processes left behind.

    No other process may be writing to the folder.
    """
    for unfinished in folder.glob(".*.unfinished"):
        unfinished.unlink()


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write the content, with text as UTF-8, to a temporary file and rename that to `file`."""
    with atomic_file(file) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and move its files into `folder`, one by one, on success.

    If an error occurs, no file is moved. Other files in `folder` stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as unfinished:
        yield Path(unfinished)
        for file in sorted(Path(unfinished).iterdir()):
            os.replace(file, folder / file.name)
