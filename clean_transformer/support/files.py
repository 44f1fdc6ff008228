"""Writes files atomically: other programs see either the old file or the complete new file."""

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir, mkdtemp

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment, unused-ignore]

# The names of the temporary folders begin with this prefix.
UNFINISHED = ".unfinished-"


def require_folder(*files: Path | None) -> None:
    """Raise an error if one of `files` cannot be written, without writing anything.

    Call this function before a long computation whose results will be saved in these files.
    Entries of `files` that are None are ignored. Raises `FileNotFoundError` for a missing folder,
    `IsADirectoryError` for a path that is a folder, and `PermissionError` if we have no permission
    to write.
    """
    for file in files:
        if file is None:
            continue
        folder = target(file).parent
        if not is_special(file) and not folder.is_dir():
            folder_name = str(folder if file.is_symlink() else file.parent)
            raise FileNotFoundError(f"no folder {folder_name!r} for {file.name!r}; make it first")
        if file.is_dir():
            raise IsADirectoryError(f"{str(file)!r} is a folder; give the name of a file")
        if not os.access(file if is_special(file) else folder, os.W_OK):
            raise PermissionError(f"this user may not write {str(file)!r}; choose another folder")


def target(file: Path) -> Path:
    """Return `file` as an absolute path without symbolic links."""
    return Path(os.path.realpath(file))


def is_special(file: Path) -> bool:
    """Whether `file` is a device, a pipe, or a path in /dev or /proc, such as /dev/stdout.

    We write into such a file, instead of replacing it by a new file.
    """
    for _ in range(40):  # Linux follows 40 links
        if Path(os.path.abspath(file)).parts[1:2] in (("dev",), ("proc",)):
            return True
        if not file.is_symlink():
            break
        file = file.parent / os.readlink(file)
    return file.exists() and not file.is_file() and not file.is_dir()


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Lock `folder` until the `with` block or this process ends, and yield True.

    Yields False if the system has no locks for folders. Raises `BlockingIOError` if another process
    has locked the folder.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            message = f"another process is writing to {str(folder)!r}; wait until it has ended"
            raise BlockingIOError(message) from None
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Delete the temporary folders that killed processes left in `folder`."""
    for unfinished in folder.glob(f"{UNFINISHED}*"):
        with suppress(OSError), locked(unfinished) as held:
            if held:
                shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _staging(folder: Path, shown: Path) -> Iterator[Path]:
    """Yield a new temporary folder in `folder`, and delete it at the end of the `with` block.

    An error in writing a temporary file becomes an `OSError` that names the path `shown`.
    """
    try:
        remove_unfinished(folder)
        unfinished = Path(mkdtemp(prefix=UNFINISHED, dir=folder))
        try:
            with locked(unfinished):
                yield unfinished
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except Exception as error:
        if (number := _number(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(shown)) from error


def _number(error: BaseException) -> int | None:
    """Return the `errno` of an error in writing a temporary file, or None for any other error."""
    if isinstance(error, OSError):
        about_ours = error.filename is None or UNFINISHED in str(error.filename)
        return error.errno if about_ours else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # Rust's text for such errors
        return int(found[1])
    if "inline_container" in str(error):  # PyTorch's writer, which does not say the cause
        return errno.EIO if error.__context__ is None else _number(error.__context__) or errno.EIO
    return None


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, for the caller to write.

    If the `with` block ends without an error, the temporary file replaces `file`, and gets the
    permissions of `file`. Otherwise `file` stays as it was. If `file` is a symbolic link, the file
    that it points to is replaced. If `file` is a device or a pipe, such as /dev/stdout, the content
    of the temporary file is written into `file`.
    """
    if is_special(file):
        with _staging(Path(gettempdir()), file) as unfinished:
            yield unfinished / "file"
            with (unfinished / "file").open("rb") as content, file.open("wb") as output:
                shutil.copyfileobj(content, output)
        return
    goal = target(file)
    with _staging(goal.parent, file) as unfinished:
        yield unfinished / "file"
        _move(unfinished / "file", goal)


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
    with _staging(folder, folder) as unfinished:
        yield unfinished
        for file in sorted(unfinished.iterdir()):
            _move(file, folder / file.name)


def _move(new: Path, old: Path) -> None:
    """Move the file `new` to the path `old`, with the permissions of `old` if `old` exists.

    Otherwise `new` gets the permissions that any new file gets.
    """
    if old.exists():
        mode = stat.S_IMODE(old.stat().st_mode)
    else:
        sample = new.with_name(f"{new.name}.new")
        sample.touch()
        mode = stat.S_IMODE(sample.stat().st_mode)
        sample.unlink()
    new.chmod(mode)
    os.replace(new, old)
