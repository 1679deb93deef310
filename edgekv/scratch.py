"""Folders that end with their owner: at the end of the block, at exit, and after a kill when the next owner comes.

The owner holds a lock on the folder, which the system takes back however the process ends. So a folder that can be locked
belongs to nobody, whatever its age, and one that cannot is left alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
import weakref
from pathlib import Path

if sys.platform != "win32":
    import fcntl

#: What every such folder ends with: no other folder is ever removed.
SUFFIX = ".scratch"
#: What those begin with that lie hidden among a user's own files.
HIDDEN = ".edgekv-"
_REPLACED = "replaced"


class ScratchFolder:
    """A new folder, readable by its owner only; those that killed processes left beside it are removed first.

    Args:
        parent: where it is made; None is the temporary folder of the system.
        prefix: what its name begins with, and the names of those that are removed.

    Raises (from the constructor):
        OSError: it cannot be made.
    """

    def __init__(self, parent: Path | None, prefix: str) -> None:
        self.parent = parent or Path(tempfile.gettempdir())
        remove_abandoned(self.parent, prefix)
        while True:
            self.path = Path(tempfile.mkdtemp(SUFFIX, prefix, self.parent))
            with contextlib.suppress(FileNotFoundError, BlockingIOError):  # it was taken for abandoned before its lock
                lock = _lock(self.path)
                break
        self._finalizer = weakref.finalize(self, _end, self.path, lock, os.getpid())

    def put(self, made: Path, target: Path) -> None:
        """Move what was made in this folder to ``target``, a place beside it, in whose stead it stands then.

        What was at ``target`` is there again after an error, and after a kill when the next owner comes.

        Raises:
            OSError: it cannot be moved; nothing has changed.
        """
        if not target.exists():
            made.rename(target)
            return
        aside = self.path / _REPLACED / target.name
        aside.parent.mkdir()
        target.rename(aside)
        try:
            made.rename(target)
        except OSError:
            aside.rename(target)
            raise

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        self._finalizer()

    def __enter__(self) -> ScratchFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the scratch folders that killed processes of this user left; what cannot be looked at is left alone."""
    name = re.compile(re.escape(prefix) + r"\w{8}" + re.escape(SUFFIX))
    with contextlib.suppress(OSError):
        for path in [path for path in parent.iterdir() if name.fullmatch(path.name)]:
            with contextlib.suppress(OSError):
                lock = _lock(path)
                if lock is not None:
                    _on_killed(path, lock)


def _on_killed(path: Path, lock: int) -> None:
    try:
        if os.fstat(lock).st_uid != os.geteuid():
            return
        for old in (path / _REPLACED).glob("*"):
            if not (path.parent / old.name).exists():
                old.rename(path.parent / old.name)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


def _end(path: Path, lock: int | None, owner: int) -> None:
    if os.getpid() == owner:  # a forked child ends without it
        shutil.rmtree(path, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _lock(path: Path) -> int | None:
    """Lock a folder; None if this file system has no locks.

    Raises:
        BlockingIOError: somebody has it. FileNotFoundError: it is gone. OSError: it cannot be opened.
    """
    if sys.platform == "win32":
        return None
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), os.stat(path)):
            raise FileNotFoundError(path)
    except (BlockingIOError, FileNotFoundError):
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle
