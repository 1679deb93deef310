"""Keeps the cache of a run within a budget that changes while it runs: by hand, or as the system runs short of memory.

It decides how large the arena may be; the page manager moves the pages. What would change a run's text (compressing fp16
pages, dropping) is done only where the alternative is to be killed: at the limit of a control group, or when asked for by hand.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import BudgetError, EdgeKVError, UsageError
from edgekv.settings import KV_BUDGET, Mode
from edgekv.sizes import format_bytes
from edgekv.tiers import PressureMode, Tier

from .attention.attend import Attender
from .machine import Machine
from .options import RunOptions
from .pages.budget import BudgetPlan, resolve_budget
from .pages.manager import PageManager
from .pages.policy import candidates
from .pages.table import offloaded
from .storage.interface import PageStore
from .storage.open import open_offload
from .system.pressure import Calm, Pressure
from .system.process import return_free_memory

#: The system is asked at most so often; a decoded token takes longer on most devices.
CHECK_SECONDS = 0.05
#: After so long without pressure, a part of what was given back is used again.
CALM_SECONDS = 10.0
#: Pages that are read back together when the budget grows: RAM beyond the budget, for a moment.
REFILL_PAGES = 16
#: The part of the first arena that a stall costs, or calm brings back.
STEP_SHARE = 8


class Level(str, enum.Enum):
    """How short memory is, in the words of mobile systems."""

    NONE = "none"  #: the budget of the start is there again
    MODERATE = "moderate"  #: give back a quarter of what is in use
    CRITICAL = "critical"  #: keep only what the run needs at the least


#: What :meth:`Governor.on_pressure` takes.
LEVEL = Mode("level", Level)


@dataclass(frozen=True)
class Reclaim:
    """What one change of the budget did: how many bytes of pages had to leave RAM, how many did, and how long it took."""

    asked_bytes: int
    freed_bytes: int
    seconds: float
    budget_bytes: int


class Governor:
    """Sets the budget of one cache.

    Args:
        plan: how its budget was divided at the start.
        context: tokens that it was made for.
        attender: reads pages back from a store that is opened later; None in the inline form.
    """

    def __init__(
        self,
        manager: PageManager,
        plan: BudgetPlan,
        context: int,
        options: RunOptions,
        machine: Machine,
        attender: Attender | None,
    ) -> None:
        self.stats = PressureStats()
        self._manager = manager
        self._options = options
        self._context = context
        self._most = plan.budget_bytes
        self._machine = machine
        self._attender = attender
        self._pressure: Pressure = machine.pressure() if options.pressure == PressureMode.AUTO else Calm()
        self._store: PageStore | None = None
        self._staging = plan.budget_bytes - plan.arena_bytes if not plan.fits else 0
        #: Reclaim leaves the text as it is: pages are INT8 already, and there is flash to send them to.
        self._safe = plan.compress_at_seal and (manager.store is not None or not options.allow_drop)
        self._first = manager.arena.n_frames * manager.spec.frame_bytes
        self._next = self._calm_since = machine.now()

    @property
    def budget_bytes(self) -> int:
        """The budget in force: arena and staging."""
        return self._arena_bytes + self._staging

    @property
    def _arena_bytes(self) -> int:
        return self._manager.arena.n_frames * self._manager.spec.frame_bytes

    def set_budget(self, kv_budget: int | str) -> Reclaim:
        """Change the budget: pages that no longer fit leave RAM, and the RAM goes back to the OS; or they come back.

        Args:
            kv_budget: bytes, ``"64MiB"``, or ``"25%"`` of the fp16 cache of the context.

        Raises:
            BudgetError: it is too small; the message says how much is needed. UsageError: it is above that of the start.
                OutOfPages, StoreError: not enough could be reclaimed, and the old budget stays.
        """
        budget_bytes = resolve_budget(KV_BUDGET.check(kv_budget), self._manager.spec, self._context) or 0
        if budget_bytes > self._most:
            raise UsageError(
                f"the budget cannot grow to {format_bytes(budget_bytes)}: this run began with"
                f" {format_bytes(self._most)}, and its arena is allocated once"
            )
        staging = self._staging + (self._staging_to_come(budget_bytes) if budget_bytes < self.budget_bytes else 0)
        least = self._manager.least_bytes(self._manager.spec) + staging
        if budget_bytes < least:
            raise BudgetError(
                f"a KV budget of {format_bytes(budget_bytes)} is too small: this run needs {format_bytes(least)}; it goes on with"
                f" {format_bytes(self.budget_bytes)}"
            )
        return self._resize(min(budget_bytes - staging, self._first))

    def on_pressure(self, level: Level) -> Reclaim:
        """Answer to a system that runs short of memory, or no longer does; gives back what can be given.

        Raises:
            StoreError: flash refused; the pages are still in RAM.
        """
        manager = self._manager
        used = manager.arena.used_bytes
        target = {Level.NONE: self._first, Level.MODERATE: used - used // 4, Level.CRITICAL: 0}[level]
        return self._resize(max(target, manager.least_bytes(manager.spec)))

    def between_steps(self) -> None:
        """Ask the system, unless it was asked just now, and act. A failure is counted; the run goes on."""
        now = self._machine.now()
        if now < self._next:
            return
        self._next = now + CHECK_SECONDS
        reading = self._pressure.read()
        used, least = self._manager.arena.used_bytes, self._manager.least_bytes(self._manager.spec)
        step = self._first // STEP_SHARE
        if reading.over_bytes or (reading.stalled and self._safe):
            self._calm_since = now
            wanted = max(reading.over_bytes, step if reading.stalled and self._safe else 0)
            target = max(used - wanted, least)
            if target < self._arena_bytes:
                self._try(target)
        elif now - self._calm_since >= CALM_SECONDS and self._arena_bytes < self._first:
            self._calm_since = now
            if reading.spare_bytes is None or reading.spare_bytes > 2 * step:
                self._try(min(self._arena_bytes + step, self._first))

    def close(self) -> None:
        """Stop watching, and close the store if one was opened here."""
        self._pressure.close()
        if self._store is not None:
            self._store.close()

    def _refill(self) -> None:
        """Bring pages back from flash while there is room, those that would leave last first."""
        manager = self._manager
        last = candidates(manager.table, manager.options, Tier.COLD, among=manager.table.seen())[::-1]
        self._bring(last[: manager.spare_room()])

    def _bring(self, chosen: NDArray[np.int64]) -> None:
        """Bring pages back, rows (layer, page), for which there is room."""
        for layer in np.unique(chosen[:, 0]).tolist():
            pages = np.sort(chosen[chosen[:, 0] == layer, 1]).tolist()
            for start in range(0, len(pages), REFILL_PAGES):
                self._manager.bring(layer, pages[start : start + REFILL_PAGES])

    @property
    def _may_spill(self) -> bool:
        """The run was opened without a store, and may have one."""
        return self._manager.store is None and (self._options.offload is not None or not self._options.allow_drop)

    def _staging_to_come(self, budget_bytes: int) -> int:
        return self._attender.size_ring(budget_bytes) if self._attender is not None and self._may_spill else 0

    def _spill(self, budget_bytes: int) -> bool:
        """Give the page manager a store, if it may have one and has none, and room to read pages back from it; says if it did."""
        manager, staging = self._manager, self._staging_to_come(budget_bytes)
        if not self._may_spill:
            return False
        self._store = open_offload(self._options.storage, manager.spec, self._machine.open_medium())
        manager.store = self._store
        if self._attender is not None:
            self._attender.attach_store(self._store)
            self._staging += staging
        return True

    def _unspill(self, staging: int) -> None:
        """Take back what :meth:`_spill` gave: what went to the store comes back, into the room that it left.

        Raises:
            CorruptPage, StoreError: a page cannot be read; the store stays.
        """
        manager, store = self._manager, self._store
        assert store is not None
        self._bring(np.argwhere(offloaded(manager.table.tier)))
        manager.detach_store()
        if self._attender is not None:
            self._attender.detach_store()
        store.close()
        self._store, self._staging = None, staging

    def _try(self, arena_bytes: int) -> None:
        try:
            self._resize(arena_bytes)
        except EdgeKVError:
            self.stats.failed += 1

    def _resize(self, arena_bytes: int) -> Reclaim:
        manager = self._manager
        before, started = manager.arena.used_bytes, self._machine.now()
        staging = self._staging
        # Even if all fits now, the pages to come may not.
        spilled = arena_bytes < self._first and self._spill(arena_bytes)
        grows = arena_bytes > self._arena_bytes
        try:
            manager.set_budget(arena_bytes)
        except BaseException:
            if spilled:
                self._unspill(staging)
            raise
        if grows:
            self._refill()
        else:
            return_free_memory()
        freed = max(0, before - manager.arena.used_bytes)
        done = Reclaim(max(0, before - arena_bytes), freed, self._machine.now() - started, self.budget_bytes)
        self.stats.count(done.asked_bytes, done.freed_bytes, done.seconds, done.budget_bytes)
        return done


@dataclass
class PressureStats:
    """Changes of the budget while a run went on. ``asked_bytes`` of pages had to leave RAM, ``freed_bytes`` did."""

    changes: int = 0
    failed: int = 0
    asked_bytes: int = 0
    freed_bytes: int = 0
    seconds: float = 0.0
    longest_s: float = 0.0
    budget_bytes: int = 0  #: in force after the last change

    def count(self, asked_bytes: int, freed_bytes: int, seconds: float, budget_bytes: int) -> None:
        """Add one change."""
        self.changes += 1
        self.asked_bytes += asked_bytes
        self.freed_bytes += freed_bytes
        self.seconds += seconds
        self.longest_s = max(self.longest_s, seconds)
        self.budget_bytes = budget_bytes
