"""Writing files so that a reader sees the old one or the new one, never half of one."""

import os
from pathlib import Path


def require_folder(file: Path) -> None:
    """Raise `FileNotFoundError` unless there is a folder for it: ask before the work it holds."""
    if not file.parent.is_dir():
        raise FileNotFoundError(f"no folder {str(file.parent)!r} for {file.name!r}; make it first")


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write the content, text as UTF-8, beside the file, then put it in the file's place."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
