"""What a run stands on: who computes, where bytes go, what time it is.

A run on this machine stands on :data:`HOST`, which hands everything through. The emulator stands in its place with a device
whose time is computed (:mod:`edgekv.emulator`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .meter import SILENT, Meter
from .storage.medium import SYSTEM, Medium
from .storage.reads import Reads
from .system.pressure import Pressure, SystemPressure
from .system.process import peak_rss_bytes

if TYPE_CHECKING:
    from .kernels.interface import Pool
    from .pages.budget import BudgetPlan
    from .pages.cache import KVCache


class Machine(Protocol):
    """Stands between a run and the parts that take time, memory or flash. All calls but the medium's come from one thread."""

    @property
    def medium(self) -> Medium:
        """Where page files are."""
        ...

    @property
    def meter(self) -> Meter:
        """Who is told what a run does."""
        ...

    def now(self) -> float:
        """Seconds from any fixed moment."""
        ...

    def reads(self, pool: Pool) -> Reads:
        """Return what reads ahead; ``pool`` checks what came."""
        ...

    def watch(self, cache: KVCache, plan: BudgetPlan, abandon: Callable[[], None]) -> None:
        """A run has a new cache. ``abandon`` lets its session go as the end of the process would: nothing more is saved."""
        ...

    def pressure(self) -> Pressure:
        """Return what says how short of memory the machine is."""
        ...

    def peak_rss_bytes(self) -> int:
        """Largest resident set of the process so far; 0 where nobody says."""
        ...


class Host:
    """The machine itself: everything is what it is."""

    medium: Medium = SYSTEM
    meter: Meter = SILENT

    def now(self) -> float:
        """Return the time of the performance counter."""
        return time.perf_counter()

    def reads(self, pool: Pool) -> Reads:
        """Return reads on threads of their own."""
        return Reads(pool)

    def watch(self, cache: KVCache, plan: BudgetPlan, abandon: Callable[[], None]) -> None:
        """Let it run."""

    def pressure(self) -> Pressure:
        """Return what the system says."""
        return SystemPressure()

    def peak_rss_bytes(self) -> int:
        """Return what the OS counted."""
        return peak_rss_bytes()


HOST = Host()
