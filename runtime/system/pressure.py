"""How short of memory the system is: what a control group may still use, and whether programs stall for memory.

Sources: Linux control groups, version 2 (``memory.high``, ``memory.max``) and 1 (``memory.limit_in_bytes``), and pressure stall
information (https://docs.kernel.org/accounting/psi.html). What a system does not have is not watched. Nothing here waits:
the kernel is asked between tokens.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PROC = Path("/proc")

#: Share of a limit that is kept free: the kernel's own reclaim begins before the limit is reached.
MARGIN = 1 / 16
#: Some task stalled for 150 ms within 2 s. Windows of whole 2 s need no privilege.
TRIGGER = b"some 150000 2000000\0"
#: A limit above this is none.
UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Reading:
    """What the system says now.

    ``over_bytes``: what is used beyond the limit less its margin; ``spare_bytes``: what may still be used, None without a limit;
    ``stalled``: tasks waited for memory since the last reading.
    """

    over_bytes: int = 0
    spare_bytes: int | None = None
    stalled: bool = False


class Pressure(Protocol):
    """Says how short of memory a system is."""

    def read(self) -> Reading:
        """Ask; takes well below a millisecond."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...


class Calm:
    """Never short of memory: for ``--pressure ignore``."""

    def read(self) -> Reading:
        """Return a reading without pressure."""
        return Reading()

    def close(self) -> None:
        """Do nothing."""


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


class SystemPressure:
    """The pressure on this process: its control groups, and stalls of its group or, without one, of the system."""

    def __init__(self) -> None:
        self.groups = list(control_groups())
        self._stalls = _open_stalls([group.folder for group in self.groups])
        self._poll = select.poll() if self._stalls is not None else None
        if self._poll is not None and self._stalls is not None:
            self._poll.register(self._stalls, select.POLLPRI)

    def read(self) -> Reading:
        """Ask the kernel."""
        spare: int | None = None
        for group in self.groups:
            found = group.used_and_limit()
            if found is not None:
                used, limit = found
                left = int(limit * (1 - MARGIN)) - used
                spare = left if spare is None else min(spare, left)
        return Reading(max(0, -spare) if spare is not None else 0, spare, self._stalled())

    def _stalled(self) -> bool:
        if self._poll is None:
            return False
        events = [event for _, event in self._poll.poll(0)]
        if any(event & select.POLLERR for event in events):  # the group is gone
            self.close()
            return False
        return bool(events)

    def close(self) -> None:
        """Close the trigger."""
        self._poll = None
        if self._stalls is not None:
            os.close(self._stalls)
            self._stalls = None


def control_groups() -> Iterator[ControlGroup]:
    """Yield the control groups of this process that account for memory, its own first, then those above it."""
    try:
        mounts = (PROC / "self" / "mountinfo").read_text(encoding="utf-8").splitlines()
        places = (PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for place in places:
        number, controllers, path = place.split(":", 2)
        kind: str
        files: tuple[str, tuple[str, ...], bytes]
        if number == "0":
            kind, files = "cgroup2", ("memory.current", ("memory.high", "memory.max"), b"inactive_file ")
        elif "memory" in controllers.split(","):
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


def _open_stalls(folders: list[Path]) -> int | None:
    """Arm a trigger on the stalls of the closest group, or of the system; None where there is neither."""
    for path in [*(folder / "memory.pressure" for folder in folders[:1]), PROC / "pressure" / "memory"]:
        try:
            file = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            os.write(file, TRIGGER)
        except OSError:
            os.close(file)
            continue
        return file
    return None
