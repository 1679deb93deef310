"""The file that keeps XNNPACK's packed weights, so that a start maps them instead of packing again.

XNNPACK trusts the file's contents. So its name says for what it was made (model, executorch version, CPU), and a note
beside it says how the process that wrote it left it: a file that differs from its note is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import weakref
from pathlib import Path

from edgekv.bundle import Manifest
from edgekv.errors import FormatError
from edgekv.files import make_own_folder, open_file, read_own, replace_own
from edgekv.host import processor
from edgekv.schema import plain_json

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
            state = _state(self.path)
            if os.path.lexists(self.path) and (state is None or state != _read(self._note)):
                _log.warning("edgekv: %s is not as it was written; the weights are packed again", self.path)
                self.path.unlink()
        except OSError:
            return None
        weakref.finalize(self, _write_note, self.path, self._note)
        return self.path


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
