"""Files and folders of this user alone: a link or a stranger's file in the way of one is refused, not followed.

What edgekv writes holds what people say to a model, and some of what it finds in the cache folder is code. So new files are made,
not found (mode 0600, folders 0700), and those that are found must be plain files of this user.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from pathlib import Path

#: A pipe in the place of a file must not make the open wait for who is at its other end.
_CAREFUL = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_WRITES = os.O_WRONLY | os.O_RDWR
_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


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


def open_file(path: Path, flags: int, *, own: bool = False, linked: bool = False) -> int:
    """Open a file and return its handle; one that is written must be this user's.

    Args:
        flags: as of ``os.open``; a file that O_CREAT makes has mode 0600.
        own: one that is only read must be this user's too, with nobody else allowed to write it.
        linked: it may have other names (hard links).

    Raises:
        OSError: it cannot be opened, or is none that may be used; ``strerror`` says why.
    """
    if path.is_symlink():
        raise OSError(None, "it is a link, and links are not followed", str(path))
    handle = os.open(path, flags | _CAREFUL, 0o600)
    try:
        status, writes = os.fstat(handle), bool(flags & _WRITES)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(None, "it is not a file", str(path))
        if (writes or own) and not _is_own(path, status):
            raise OSError(None, "it belongs to another user", str(path))
        if own and status.st_mode & _BY_OTHERS:
            raise OSError(None, "others may write it", str(path))
        if (writes or own) and status.st_nlink > 1 and not linked:
            raise OSError(None, "it has another name elsewhere (a hard link)", str(path))
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


def read_own(path: Path) -> bytes:
    """Return the bytes of a file that only this user can have written.

    Raises:
        OSError: it cannot be read, or others could have written it.
    """
    with os.fdopen(open_file(path, os.O_RDONLY, own=True), "rb") as stream:
        return stream.read()


def replace_own(path: Path, data: bytes) -> None:
    """Write a file of this user in the place of whatever had its name, at once.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(create_file(beside), "wb") as stream:
            stream.write(data)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def reason(error: OSError) -> str:
    """Return why a file of a folder cannot be used, with its name where it was refused for what it is."""
    named = error.errno is None and error.filename
    return f"{Path(error.filename).name}: {error.strerror}" if named else error.strerror or str(error)


def make_own_folder(path: Path) -> None:
    """Make a folder for what nobody else may have put there; one of this user that others may write is closed to them.

    Raises:
        OSError: it belongs to another user, or cannot be made.
    """
    make_folder(path)
    status = os.stat(path)
    if not _is_own(path / "_", status):
        raise OSError(None, "it belongs to another user", str(path))
    if status.st_mode & _BY_OTHERS:
        os.chmod(path, 0o700)


def is_own_folder(path: Path) -> bool:
    """Say whether a folder is there that nobody else may write into."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and not status.st_mode & _BY_OTHERS and _is_own(path / "_", status)


def _is_own(path: Path, status: os.stat_result) -> bool:
    if status.st_uid == os.geteuid():
        return True
    # A file system without owners gives every file the same one, and so what is made there now.
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            return os.fstat(probe.fileno()).st_uid == status.st_uid
    except OSError:
        return False
