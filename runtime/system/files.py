"""Files and folders of this user alone: a link or a stranger's file in the way of one is refused, not followed.

What edgekv writes holds what people say to a model, and what it loads from the cache folder is code. So new files are made, not
found (mode 0600, folders 0700), and those that are found must be plain files of this user.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

#: A pipe in the place of a file must not make the open wait for who is at its other end.
_CAREFUL = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def make_folder(path: Path) -> None:
    """Make a folder that only this user may enter, and the folders above it likewise; one that is there stays as it is.

    Raises:
        OSError: it cannot be made, or something else is there.
    """
    for folder in reversed((path, *path.parents)):
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)


def create_file(path: Path) -> int:
    """Make a file and return its handle, for reading and writing.

    Raises:
        OSError: something is there already, or it cannot be made.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _CAREFUL, 0o600)


def open_file(path: Path, flags: int, *, linked: bool = False) -> int:
    """Open a file and return its handle; one that is written must be this user's.

    Args:
        flags: as of ``os.open``; a file that O_CREAT makes has mode 0600.
        linked: it may have other names (hard links).

    Raises:
        OSError: it cannot be opened, or is none that may be used; the text says why.
    """
    if os.path.islink(path):
        raise OSError(None, "it is a link, which is not followed", str(path))
    handle = os.open(path, flags | _CAREFUL, 0o600)
    try:
        status = os.fstat(handle)
        refused = ""
        if not stat.S_ISREG(status.st_mode):
            refused = "it is not a file"
        elif flags & (os.O_WRONLY | os.O_RDWR):
            if not _is_own(path, status):
                refused = "it belongs to another user"
            elif status.st_nlink > 1 and not linked:
                refused = "it has another name elsewhere (a hard link)"
        if refused:
            raise OSError(None, refused, str(path))
    except BaseException:
        os.close(handle)
        raise
    return handle


def open_again(path: Path, handle: int, flags: int) -> int | None:
    """Open a file a second time, in another way; None where the system refuses, or another file is there by now."""
    try:
        other = os.open(path, flags | _CAREFUL)
    except OSError:
        return None
    if os.path.samestat(os.fstat(other), os.fstat(handle)):
        return other
    os.close(other)
    return None


def _is_own(path: Path, status: os.stat_result) -> bool:
    if status.st_uid == os.geteuid():
        return True
    # A file system without owners gives every file the same one, and so what is made there now.
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            return os.fstat(probe.fileno()).st_uid == status.st_uid
    except OSError:
        return False
