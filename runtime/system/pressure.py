"""How short of memory the system is: what a control group may still use, and whether programs stall for memory.

Sources: Linux control groups, version 2 (``memory.high``, ``memory.max``) and 1 (``memory.limit_in_bytes``), and pressure stall
information (https://docs.kernel.org/accounting/psi.html). What a system does not have is not watched. Nothing here waits:
the kernel is asked between tokens.
"""

from __future__ import annotations

import os
import select
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgekv.host import PROC, control_groups

#: Share of a limit that is kept free: the kernel's own reclaim begins before the limit is reached.
MARGIN = 1 / 16
#: Some task stalled for 150 ms within 2 s. Windows of whole 2 s need no privilege.
TRIGGER = b"some 150000 2000000\0"


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
