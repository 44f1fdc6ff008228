"""Writing files so that a reader sees the old one or the new one, never half of one."""

import os
from pathlib import Path


def write_atomically(file: Path, text: str) -> None:
    """Write the text beside the file, then put it in the file's place."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
