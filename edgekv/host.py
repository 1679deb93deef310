"""What the operating system says of this machine and of this process's place in it: processor, control groups, folders."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
#: The classes of machines that engines and kernels tell apart, as :func:`machine_class` names them.
MACHINES = ("x86-64", "x86-64, AVX2", "x86-64, AVX-512 VNNI", "arm64", "arm64, dotprod")
#: What the firmware of a board calls it.
_BOARD = PROC / "device-tree" / "model"
#: A limit above this is none.
UNLIMITED = 1 << 60


def processor() -> dict[str, str]:
    """Return what /proc/cpuinfo says of the first core, by its own words ("flags", "Features", "CPU part"); {} elsewhere."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in (PROC / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    return found


def processor_features() -> set[str]:
    """Return the features of the first core, as Linux names them; none where it does not say."""
    words = processor()
    return set((words.get("flags") or words.get("Features") or "").split())


def machine_name() -> str:
    """Return what the processor calls itself, or the board where only that has a name (Arm), or its architecture."""
    with contextlib.suppress(OSError):
        board = _BOARD.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
        if board:
            return board
    return processor().get("model name") or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return how many cores this process may use."""
    with contextlib.suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ram_bytes() -> int:
    """Return the RAM of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine_class() -> str:
    """Name the class of this machine, as :func:`class_of` does."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "arm64, dotprod"
    return class_of(platform.machine(), processor_features())


def class_of(machine: str, features: set[str]) -> str:
    """Name the class of a machine: its architecture and the widest integer products that it has.

    One of :data:`MACHINES`, or another architecture.

    Args:
        machine: the architecture, as ``uname -m`` names it.
        features: of its processor, as Linux names them.
    """
    machine = machine.lower()
    if machine in ("x86_64", "amd64"):
        for flag, name in (("avx512_vnni", "AVX-512 VNNI"), ("avx2", "AVX2")):
            if flag in features:
                return f"x86-64, {name}"
        return "x86-64"
    if machine in ("aarch64", "arm64"):
        return "arm64, dotprod" if "asimddp" in features else "arm64"
    return machine


@dataclass(frozen=True)
class ControlGroup:
    """A control group with a limit on memory; the names of its files."""

    folder: Path
    usage: str
    limits: tuple[str, ...]
    cached: bytes

    def used_and_limit(self) -> tuple[int, int] | None:
        """Return what is used, without file pages that were not read of late, and the limit in force, or None without one."""
        limits = [limit for limit in map(self._number, self.limits) if limit is not None and limit < UNLIMITED]
        used = self._number(self.usage)
        if not limits or used is None:
            return None
        return used - self._cached_bytes(), min(limits)

    def _number(self, name: str) -> int | None:
        try:
            return int((self.folder / name).read_bytes())
        except (OSError, ValueError):  # no such file, or "max"
            return None

    def _cached_bytes(self) -> int:
        with contextlib.suppress(OSError):
            for line in (self.folder / "memory.stat").read_bytes().splitlines():
                if line.startswith(self.cached):
                    return int(line.split()[1])
        return 0


def group_paths() -> list[tuple[str, list[str], str]]:
    """Return the control groups of this process: the number of each hierarchy, its controllers, and the path in it."""
    try:
        places = (PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [(number, names.split(","), path) for number, names, path in (place.split(":", 2) for place in places)]


def control_groups() -> Iterator[ControlGroup]:
    """Yield the control groups of this process that account for memory, its own first, then those above it."""
    try:
        mounts = (PROC / "self" / "mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for number, controllers, path in group_paths():
        kind: str
        files: tuple[str, tuple[str, ...], bytes]
        if number == "0":
            kind, files = "cgroup2", ("memory.current", ("memory.high", "memory.max"), b"inactive_file ")
        elif "memory" in controllers:
            kind, files = "cgroup", ("memory.usage_in_bytes", ("memory.limit_in_bytes",), b"total_inactive_file ")
        else:
            continue
        for mount in mounts:
            fields, _, rest = mount.partition(" - ")
            system, _, options = rest.split(" ", 2)
            if system == kind and (kind == "cgroup2" or "memory" in options.split(",")):
                root, top = fields.split(" ")[3:5]
                inside = path[len(root) :] if root != "/" and path.startswith(root) else path
                folder = Path(top) / inside.strip("/")
                while folder != Path(top).parent:
                    if (folder / files[0]).exists():
                        yield ControlGroup(folder, *files)
                    folder = folder.parent


def user_folder(variable: str, below_home: str) -> Path:
    """Return edgekv's own folder in one of the user's, as the XDG specification names them: a relative path is ignored.

    A user without a home, as in some containers, has one in the temporary folder.
    """
    chosen = Path(os.environ.get(variable, ""))
    if not chosen.is_absolute():
        try:
            home = Path.home()
        except RuntimeError:
            home = Path()
        if not home.is_absolute():
            home = Path(tempfile.gettempdir()) / f"edgekv-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
        chosen = home / below_home
    return chosen / "edgekv"
