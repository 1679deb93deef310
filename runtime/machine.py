"""What a run stands on: who computes, where bytes go, what time it is.

A run on this machine stands on :data:`HOST`, which hands everything through. The emulator stands in its place with a device
whose time is computed (:mod:`edgekv.emulator`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .storage.medium import SYSTEM, Medium
from .storage.reads import Reads
from .storage.ring import PageReader
from .system.pressure import Pressure, SystemPressure
from .system.process import peak_rss_bytes

if TYPE_CHECKING:
    from edgekv.bundle import Manifest
    from edgekv.spec import ModelSpec, PageSpec

    from .engines.base import InlineEngine, SegmentEngine
    from .kernels.interface import PagedAttention, Pool, Refs
    from .pages.budget import BudgetPlan
    from .pages.cache import KVCache
    from .storage.interface import PageStore


class Machine(Protocol):
    """Stands between a run and the parts that take time, memory or flash. All calls but the medium's come from one thread."""

    @property
    def medium(self) -> Medium:
        """Where page files are."""
        ...

    def now(self) -> float:
        """Seconds from any fixed moment."""
        ...

    def segments(self, engine: SegmentEngine, manifest: Manifest) -> SegmentEngine:
        """Return what runs the segments of a bundle that was just loaded."""
        ...

    def inline(self, engine: InlineEngine, manifest: Manifest) -> InlineEngine:
        """Return what runs the graph of an inline bundle."""
        ...

    def attention(self, attention: PagedAttention, model: ModelSpec, spec: PageSpec) -> PagedAttention:
        """Return what attends to pages."""
        ...

    def reader(self, store: PageStore, spec: PageSpec, capacity: int, ring: int, pool: Pool) -> PageReader:
        """Return what reads pages ahead; see :class:`PageReader`. ``pool`` checks what came."""
        ...

    def begin_token(self, refs: Refs) -> None:
        """A step of one token begins over ``refs`` [n_layers, n_pages]; no page moves before every layer has attended."""
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

    def now(self) -> float:
        """Return the time of the performance counter."""
        return time.perf_counter()

    def segments(self, engine: SegmentEngine, manifest: Manifest) -> SegmentEngine:
        """Return the engine."""
        return engine

    def inline(self, engine: InlineEngine, manifest: Manifest) -> InlineEngine:
        """Return the engine."""
        return engine

    def attention(self, attention: PagedAttention, model: ModelSpec, spec: PageSpec) -> PagedAttention:
        """Return the kernel."""
        return attention

    def reader(self, store: PageStore, spec: PageSpec, capacity: int, ring: int, pool: Pool) -> PageReader:
        """Return a reader."""
        return PageReader(store, spec, capacity, ring, Reads(pool))

    def begin_token(self, refs: Refs) -> None:
        """Let it begin."""

    def watch(self, cache: KVCache, plan: BudgetPlan, abandon: Callable[[], None]) -> None:
        """Let it run."""

    def pressure(self) -> Pressure:
        """Return what the system says."""
        return SystemPressure()

    def peak_rss_bytes(self) -> int:
        """Return what the OS counted."""
        return peak_rss_bytes()


HOST = Host()
