"""Writes files atomically: other programs see either the old file or the complete new file."""

import errno
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir, mkdtemp

from clean_transformer.support.interrupts import Interrupts

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment, unused-ignore]

# The names of the temporary folders begin with this prefix.
UNFINISHED = ".unfinished-"

# The name of the folder of files that are complete, and that `finish` moves into place.
FINISHED = ".finished"


# The name of a file that stands for standard output.
STANDARD_OUTPUT = Path("-")


def require_folder(*files: Path | None) -> None:
    """Raise an error if one of `files` cannot be written, without writing anything.

    Call this function before a long computation whose results will be saved in these files.
    Entries of `files` that are None or `STANDARD_OUTPUT` are ignored. Raises `FileNotFoundError`
    for a missing folder, `IsADirectoryError` for a path that is a folder, `PermissionError` if we
    have no permission to write, and `ValueError` if two of `files` are the same file.
    """
    given = [file for file in files if file not in (None, STANDARD_OUTPUT)]
    for number, file in enumerate(given):
        if not is_special(file) and target(file) in map(target, given[:number]):
            raise ValueError(f"two results cannot be written to the same file, {str(file)!r}")
        folder = target(file).parent
        if not is_special(file) and not folder.is_dir():
            folder_name = str(folder if file.is_symlink() else file.parent)
            raise FileNotFoundError(f"no folder {folder_name!r} for {file.name!r}; make it first")
        if file.is_dir():
            raise IsADirectoryError(f"{str(file)!r} is a folder; give the name of a file")
        if not os.access(file if is_special(file) else folder, os.W_OK):
            raise PermissionError(f"this user may not write {str(file)!r}; choose another folder")


def require_output_folder(folder: Path) -> None:
    """Raise an error if files cannot be written in `folder`, which may not exist yet.

    Raises `NotADirectoryError` if `folder` or a folder above it is a file, and `PermissionError`
    without the right to write.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{str(existing)!r} is a file; give the name of a folder")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"this user may not write in {str(existing)!r}")


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
        with ExitStack() as lock:
            unfinished = _new_locked(folder, lock)
            try:
                yield unfinished
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except Exception as error:
        if (number := _number(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(shown)) from error


def _new_locked(folder: Path, lock: ExitStack) -> Path:
    """Return a new temporary folder in `folder`, which is locked until `lock` is closed."""
    while True:
        unfinished = Path(mkdtemp(prefix=UNFINISHED, dir=folder))
        # Until it is locked, `remove_unfinished` of another process may delete the folder.
        with suppress(BlockingIOError, FileNotFoundError):
            lock.enter_context(locked(unfinished))
            if unfinished.exists():
                return unfinished


def _number(error: BaseException) -> int | None:
    """Return the `errno` of an error in writing a temporary file, or None for any other error."""
    if isinstance(error, OSError):
        about_ours = error.filename is None or UNFINISHED in str(error.filename)
        return error.errno if about_ours else None
    # Rust's two texts for such errors: "(os error 27)", and "Os { code: 27, …" of old safetensors.
    if found := re.search(r"\b(?:os error|Os \{ code:) (\d+)", str(error)):
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
    if file == STANDARD_OUTPUT or is_special(file):
        with _staging(Path(gettempdir()), file) as unfinished:
            yield unfinished / "file"
            if file == STANDARD_OUTPUT:
                sys.stdout.flush()
                sys.stdout.buffer.write((unfinished / "file").read_bytes())
                return
            with (unfinished / "file").open("rb") as content, file.open("wb") as output:
                shutil.copyfileobj(content, output)
        return
    goal = target(file)
    with _staging(goal.parent, file) as unfinished:
        yield unfinished / "file"
        (unfinished / "file").chmod(_mode(goal, unfinished))
        os.replace(unfinished / "file", goal)


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write `content` to `file` atomically, with `atomic_file`. A `str` is written as UTF-8."""
    with atomic_file(file) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Create `folder`, and the folders above it, for the `with` block.

    If the `with` block ends with an error, those of them that are new and empty are deleted.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in new:
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield the path of a temporary folder, for the caller to write files into.

    If the `with` block ends without an error, all files are moved into `folder`. Otherwise no file
    is moved. Files in `folder` with other names stay as they are. `folder` is created if it is
    missing (see `made_folder`). If the process is killed while the files are moved, `finish` moves
    the other files.
    """
    with made_folder(folder), _staging(folder, folder) as unfinished:
        yield unfinished
        goals = [folder / file.name for file in unfinished.iterdir()]
        require_folder(*goals)
        for goal in goals:
            (unfinished / goal.name).chmod(_mode(goal, unfinished))
        with Interrupts():
            while True:
                finish(folder)
                try:
                    unfinished.rename(folder / FINISHED)
                    break
                except OSError as error:  # another process has just done the same
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
            finish(folder)


def finish(folder: Path) -> None:
    """Move files into `folder` that `atomic_folder` wrote completely before its process was killed.

    Several processes may call this function at the same time. Raises `OSError` if a file cannot be
    moved, for example because this user may not write to `folder`.
    """
    finished = folder / FINISHED
    if finished.is_symlink() or not finished.is_dir():
        return
    for file in sorted(finished.iterdir()):
        with suppress(FileNotFoundError):  # another process has moved the file
            os.replace(file, folder / file.name)
    with suppress(OSError):  # another process has removed it, or filled it again
        finished.rmdir()


def _mode(file: Path, unfinished: Path) -> int:
    """Return the permissions of `file`, or of a new file in `unfinished` if `file` is missing."""
    if file.exists():
        return stat.S_IMODE(file.stat().st_mode)
    sample = unfinished / ".new"
    sample.touch()
    mode = stat.S_IMODE(sample.stat().st_mode)
    sample.unlink()
    return mode
