"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STALE_AFTER = 60.0  # seconds without a write after which a temporary file that nobody holds is a killed writer's

Mark = tuple[int, int, int]
"""What changes whenever a file is written anew: its number on the disk, its time, its length."""


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> Mark | None:
    """Calls `write(file)` on a temporary file beside `path`, flushes it to the disk, then renames it into place.

    Whatever happens, `path` holds either what it held before or all of the new content; a link stays a link, and the
    file that it names is replaced. What killed writers left beside it is removed. Returns the mark of what was written,
    which is no longer that of `path` once another writes there. Raises OSError naming `path`.
    """
    try:
        target = path.resolve()
        if target.exists() and not target.is_file():  # a device or a pipe would be replaced by a file
            raise OSError(errno.EINVAL, "it is no file; choose another name")
        remove_stale(target)
        temporary = _temporary(target)
        try:
            with open(temporary, "xb") as file:  # opened, not made by tempfile: it gets the umask's permissions
                _hold(file)
                write(file)
                file.flush()
                os.fsync(file.fileno())
                written = mark(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):  # the error that counts is the first
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
        return written
    except OSError as error:
        reason = error.strerror or str(error)
        cure = "free space or choose another folder" if error.errno in DISK_FULL else "choose another place"
        told = reason if ";" in reason else f"{reason}; {cure}"
        raise OSError(error.errno, f"could not write {path}: {told}") from error


def keep_copy(path: Path, copy: Path) -> None:
    """Lets `copy` hold what `path` holds, whole or not at all, by a link where there are links. Raises OSError.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = Path(folder, "a").write_text("hello")
    ...     keep_copy(Path(folder, "a"), Path(folder, "b"))
    ...     Path(folder, "b").read_text()
    'hello'
    """
    remove_stale(copy)
    temporary = _temporary(copy)
    try:
        os.link(path, temporary)
        os.replace(temporary, copy)
    except OSError:  # no links here, or another run removed this one, which is as old as the file
        with path.open("rb") as source:
            write_whole(copy, lambda file: shutil.copyfileobj(source, file))
    finally:
        temporary.unlink(missing_ok=True)  # still there where both were links to one file already


def remove_stale(path: Path) -> None:
    """Removes the temporary files that killed writers of `path` left beside it.

    A killed writer's is one that was not written to for a minute, and that no living process holds. A time in the
    future counts as long ago: the clock was set back. A folder that cannot be listed is left as it is.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     left = Path(folder, ".a.npz.x1.tmp")
    ...     left.touch()
    ...     os.utime(left, (0, 0))
    ...     remove_stale(Path(folder, "a.npz"))
    ...     left.exists()
    False
    """
    target = path.resolve()
    names: list[str] = []
    with suppress(OSError):
        names = os.listdir(target.parent)
    for name in names:
        if name.startswith(f".{target.name}.") and name.endswith(".tmp"):
            left = target.with_name(name)
            with suppress(OSError):  # another run may have removed it; one that cannot be removed does no harm
                old = abs(time.time() - left.stat().st_mtime) > STALE_AFTER
                if old and left.is_file() and not _is_held(left):
                    left.unlink()


def mark(file: Path | int) -> Mark | None:
    """The mark of a file by its path or its handle; None where there is none.

    >>> mark(Path("no/such/file"))
    """
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _temporary(target: Path) -> Path:
    """A new name beside `target`, which tells `remove_stale` whose it is."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def _hold(file: BinaryIO) -> None:
    """Marks a file as one that this process writes, as long as it is open: a disk may be slow, a clock may leap."""
    if sys.platform != "win32":
        with suppress(OSError):  # no locks here: its age alone tells
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_held(path: Path) -> bool:
    """Whether a process holds the file by `_hold`; False where there are no locks."""
    if sys.platform == "win32":
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the system lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def try_to_write(path: Path) -> None:
    """Creates the folder and writes a file to it once, before any time is spent. Raises OSError naming the folder."""
    trial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    if path.is_dir():
        raise OSError(errno.EISDIR, f"{path} is a folder, where the checkpoint goes; remove it, or choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            trial.write_bytes(b"\0")
            trial.unlink()
        except BaseException:
            with suppress(OSError):  # the error that counts is the first, which may be that of the removal
                trial.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason, cure = error.strerror or str(error), "choose another folder or model_name"
        raise OSError(error.errno, f"save_dir {path.parent} cannot be written ({reason}); {cure}") from error
