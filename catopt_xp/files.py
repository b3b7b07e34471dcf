"""Files that are written whole or not at all. Floor F0."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STALE_AFTER = 60.0  # seconds without a write after which the writer of a temporary file counts as killed


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write(file)` on a temporary file beside `path`, flushes it to the disk, then renames it into place.

    Whatever happens, `path` holds either what it held before or all of the new content; a link stays a link, and the
    file that it names is replaced. Raises OSError naming `path`.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():  # a device or a pipe would be replaced by a file
        raise OSError(errno.EINVAL, f"could not write {path}: it is no file; choose another name")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:  # opened, not made by tempfile: it gets the umask's permissions
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        cure = "free space or choose another folder" if error.errno in DISK_FULL else "choose another place"
        raise OSError(error.errno, f"could not write {path}: {reason}; {cure}") from error
    _sync_folder(target.parent)


def keep_copy(path: Path, copy: Path) -> None:
    """Lets `copy` hold what `path` holds, whole or not at all, by a link where there are links. Raises OSError.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = Path(folder, "a").write_text("hello")
    ...     keep_copy(Path(folder, "a"), Path(folder, "b"))
    ...     Path(folder, "b").read_text()
    'hello'
    """
    temporary = copy.with_name(f".{copy.name}.{secrets.token_hex(4)}.tmp")
    try:
        os.link(path, temporary)
    except OSError:  # no links here
        write_whole(copy, lambda file: shutil.copyfileobj(path.open("rb"), file))
    else:
        os.replace(temporary, copy)


def remove_stale(path: Path) -> None:
    """Removes the temporary files that killed writers of `path` left beside it, those not written to for a minute.

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
    for left in target.parent.iterdir():
        if left.name.startswith(f".{target.name}.") and left.suffix == ".tmp":
            with suppress(OSError):  # another run may have removed it; one that cannot be removed does no harm
                if time.time() - left.stat().st_mtime > STALE_AFTER:
                    left.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the system lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
