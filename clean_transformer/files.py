"""Writing files so that a reader sees the old one or the new one, never half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def in_place_of(file: Path) -> Iterator[Path]:
    """A file beside it to write, which is put in its place at the end, unless an error comes."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomically(file: Path, text: str) -> None:
    """Write the text beside the file, then put it in the file's place."""
    with in_place_of(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
