"""The file that keeps XNNPACK's packed weights, so that a start maps them instead of packing again.

XNNPACK trusts the file's contents. So its name says for what it was made (model, executorch version, CPU), and a note
beside it says how the process that wrote it left it: a file that differs from its note is made again. Until the note is there
one process has the file to itself; whoever comes meanwhile packs into RAM. A file without a note is what a killed one left.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import sys
import weakref
from pathlib import Path

from edgekv.bundle import Manifest
from edgekv.errors import FormatError
from edgekv.files import make_own_folder, open_file, read_own, replace_own
from edgekv.host import processor
from edgekv.schema import plain_json

if sys.platform != "win32":
    import fcntl

_log = logging.getLogger(__name__)

#: The longest path that fits XNNPACK's option.
_MAX_PATH_BYTES = 255


def cpu_identity() -> str:
    """Return what decides how weights are packed: machine, model and features of the CPU."""
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    words = {name: value for name, value in processor().items() if name in names}
    return f"{platform.system()} {platform.machine()} {platform.processor()} {sorted(words.items())}"


class PackedCache:
    """The packed weights of one bundle on this machine."""

    def __init__(self, cache: Path, manifest: Manifest, version: str) -> None:
        graph = manifest.files[manifest.graphs[0]]["sha256"]
        key = hashlib.sha256(f"{graph} {manifest.weights} {version} {cpu_identity()}".encode()).hexdigest()[:24]
        self.path = (cache / "packed").resolve() / f"{key}.bin"
        self._note = self.path.with_suffix(".json")

    def open(self) -> Path | None:
        """Return the file's path, ready to be used; None if it cannot be: the weights are then packed into RAM.

        The note is written when this object is gone, or at exit.
        """
        if len(str(self.path).encode()) > _MAX_PATH_BYTES:
            return None
        try:
            make_own_folder(self.path.parent)
            lock = open_file(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
        except OSError:
            return None
        try:
            if not self._take(lock):
                os.close(lock)
                return None
        except OSError:
            os.close(lock)
            return None
        weakref.finalize(self, _leave, self.path, self._note, lock)
        return self.path

    def _take(self, lock: int) -> bool:
        """Share a file that is whole, or have one to oneself that is not there yet; False: others have it.

        Raises:
            OSError: what is there cannot be removed.
        """
        if self._whole() and _locked(lock, alone=False) and self._whole():
            return True
        if not _locked(lock, alone=True):
            return False
        if os.path.lexists(self.path) and not self._whole():
            if os.path.lexists(self._note):
                _log.warning("edgekv: %s is not as it was written; the weights are packed again", self.path)
                self._note.unlink()
            self.path.unlink()
        return True

    def _whole(self) -> bool:
        state = _state(self.path)
        return state is not None and state == _read(self._note)


def _locked(handle: int, *, alone: bool) -> bool:
    """Lock a file, alone or with others; False: somebody has it. Where there are no locks, nobody does."""
    if sys.platform != "win32":
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
    return True


def _leave(path: Path, note: Path, lock: int) -> None:
    _write_note(path, note)
    os.close(lock)


def _write_note(path: Path, note: Path) -> None:
    with contextlib.suppress(OSError):
        path.chmod(0o600)
        state = _state(path)
        if state is not None and state != _read(note):
            replace_own(note, json.dumps(state).encode())


def _state(path: Path) -> list[int] | None:
    with contextlib.suppress(OSError):
        handle = open_file(path, os.O_RDONLY, own=True)
        status = os.fstat(handle)
        os.close(handle)
        return [status.st_size, status.st_mtime_ns]
    return None


def _read(note: Path) -> object:
    with contextlib.suppress(OSError, FormatError):
        return plain_json(read_own(note))
    return None
