"""The file that keeps XNNPACK's packed weights, so that a start maps them instead of packing again.

XNNPACK trusts the file's contents. So its name says for what it was made (model, executorch version, CPU), and a note
beside it says how the process that wrote it left it: a file that differs from its note is made again.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import platform
from pathlib import Path

from edgekv.bundle import Manifest

#: The longest path that fits XNNPACK's option.
_MAX_PATH_BYTES = 255


def cpu_identity() -> str:
    """Return what decides how weights are packed: machine, model and features of the CPU."""
    lines: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "flags", "Features", "CPU implementer", "CPU part"):
                lines.setdefault(key.strip(), value.strip())
    return f"{platform.system()} {platform.machine()} {platform.processor()} {sorted(lines.items())}"


class PackedCache:
    """The packed weights of one bundle on this machine."""

    def __init__(self, cache: Path, manifest: Manifest, version: str) -> None:
        graph = manifest.files.get(manifest.graphs[0], {}).get("sha256", manifest.source_sha256)
        key = hashlib.sha256(f"{graph} {manifest.weights} {version} {cpu_identity()}".encode()).hexdigest()[:24]
        self.path = cache / "packed" / f"{key}.bin"
        self._note = self.path.with_suffix(".json")
        self._open = False
        #: Why the file was made again, for messages; empty if it was not.
        self.reason = ""

    def open(self) -> Path | None:
        """Return the file's path, ready to be used; None if it cannot be: the weights are then packed into RAM."""
        if len(str(self.path.resolve()).encode()) > _MAX_PATH_BYTES:
            return None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self._state() != self._noted():
                self.reason = f"{self.path} was not closed properly or has changed: the weights are packed again"
                self.path.unlink()
        except OSError:
            return None
        self._open = True
        atexit.register(self.close)
        return self.path.resolve()

    def close(self) -> None:
        """Note the state of the file; nothing may write to it afterwards."""
        if not self._open:
            return
        self._open = False
        atexit.unregister(self.close)
        with contextlib.suppress(OSError):
            if (state := self._state()) is not None and state != self._noted():
                self._note.write_text(json.dumps(state), encoding="utf-8")

    def _state(self) -> list[int] | None:
        with contextlib.suppress(OSError):
            status = self.path.stat()
            return [status.st_size, status.st_mtime_ns]
        return None

    def _noted(self) -> object:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self._note.read_text(encoding="utf-8"))
        return None
