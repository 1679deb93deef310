"""What a run stands on: who computes, where bytes go, what time it is.

A run on this machine stands on :data:`HOST`, which hands everything through. The emulator stands in its place with a device
whose time is computed (:mod:`edgekv.emulator`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .meter import SILENT, Meter
from .storage.medium import Medium, SystemMedium
from .system.pressure import Pressure, SystemPressure
from .system.process import peak_rss_bytes

if TYPE_CHECKING:
    from .pages.budget import BudgetPlan
    from .pages.cache import KVCache


@runtime_checkable
class Machine(Protocol):
    """Stands between a run and the parts that take time, memory or flash. All calls but the medium's come from one thread."""

    @property
    def meter(self) -> Meter:
        """Who is told what a run does."""
        ...

    def now(self) -> float:
        """Seconds from any fixed moment."""
        ...

    def open_medium(self) -> Medium:
        """Return where the page files of one store are; the store closes it."""
        ...

    def watch(self, cache: KVCache, plan: BudgetPlan, abandon: Callable[[], None]) -> None:
        """A run has a new cache. ``abandon`` lets its session go as the end of the process would: nothing more is saved."""
        ...

    def pressure(self) -> Pressure:
        """Return the pressure on the memory of the machine."""
        ...

    def peak_rss_bytes(self) -> int:
        """Largest resident set of the process so far; 0 where nobody says."""
        ...


class Host:
    """The machine itself: everything is what it is."""

    meter: Meter = SILENT

    def now(self) -> float:
        """Return the time of the performance counter."""
        return time.perf_counter()

    def open_medium(self) -> Medium:
        """Return the file system, with threads of its own."""
        return SystemMedium()

    def watch(self, cache: KVCache, plan: BudgetPlan, abandon: Callable[[], None]) -> None:
        """Let it run."""

    def pressure(self) -> Pressure:
        """Return what the system says."""
        return SystemPressure()

    def peak_rss_bytes(self) -> int:
        """Return what the OS counted."""
        return peak_rss_bytes()


HOST = Host()
