"""The drive of an emulated device: real files, computed time, and faults that the stores meet as the system's own errors."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgekv.device_profiles.flash import FlashDevice
from edgekv.device_profiles.schema import Flash
from edgekv.emulator.clock import Clock
from edgekv.runtime.medium import SYSTEM
from edgekv.runtime.reader import PageReader, in_flight
from edgekv.runtime.store import Bytes, PageStore, StoreCounters, neighbours
from edgekv.spec import PageSpec


class EmulatedMedium:
    """A :class:`~edgekv.runtime.medium.Medium` whose requests take the time of a profile's drive.

    Reads that a :class:`EmulatedReader` makes ahead are charged when they are asked for, by the thread that runs the app; its
    own threads only move the bytes. So time depends on nothing that a scheduler decides.

    Attributes:
        full: every write fails. error_rate, damage_rate: share of the requests that fail, or return a flipped bit.
    """

    def __init__(self, flash: Flash, clock: Clock, seed: int) -> None:
        self.drive = FlashDevice(flash)
        self.full = False
        self.error_rate = self.damage_rate = 0.0
        self.reads = self.writes = self.faults = 0
        self._clock = clock
        self._random = random.Random(seed)
        self._thread = threading.local()

    def read(self, file: int, out: memoryview, offset: int) -> int:
        """Read; wait for it unless it was charged before."""
        ahead: bool = getattr(self._thread, "ahead", False)
        fault: str = self._thread.fault if ahead else self.draw()
        if not ahead:
            self._clock.wait_until(self.charge_read(self._clock.now, len(out)))
        if fault == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        got = SYSTEM.read(file, out, offset)
        if fault == "damage":
            out[got // 2] ^= 1
        return got

    def write(self, file: int, data: memoryview, offset: int) -> int:
        """Write, and wait until the drive took it."""
        if self.full:
            self.faults += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.writes += 1
        self._clock.wait_until(self.drive.write(self._clock.now, len(data)))
        return SYSTEM.write(file, data, offset)

    def sync(self, file: int) -> None:
        """Sync the real file; the time of a flush is in that of the writes."""
        SYSTEM.sync(file)

    def charge_read(self, at_s: float, size_bytes: int) -> float:
        """Return when a read that is asked for at ``at_s`` is done."""
        self.reads += 1
        return self.drive.read(at_s, size_bytes)

    def draw(self) -> str:
        """Decide what goes wrong with the next request: ``error``, ``damage``, or nothing."""
        if not self.error_rate and not self.damage_rate:
            return ""
        chance = self._random.random()
        fault = "error" if chance < self.error_rate else "damage" if chance < self.error_rate + self.damage_rate else ""
        self.faults += bool(fault)
        return fault

    @contextmanager
    def charged(self, fault: str) -> Iterator[None]:
        """Requests of this thread were charged before; ``fault`` is what goes wrong with them."""
        self._thread.ahead, self._thread.fault = True, fault
        try:
            yield
        finally:
            self._thread.ahead = False


class _Ahead:
    """The store as the reader's threads see it: every read was charged before."""

    counters: StoreCounters

    def __init__(self, store: PageStore, medium: EmulatedMedium) -> None:
        self.counters = store.counters
        self.write, self.free, self.close, self.tier = store.write, store.free, store.close, store.tier
        self._store = store
        self._medium = medium
        #: By first record of a request: what goes wrong with it.
        self.faults: dict[int, str] = {}

    def read(self, records: list[int], tags: list[int], out: Bytes) -> None:
        with self._medium.charged(self.faults.get(records[0], "")):
            self._store.read(records, tags, out)


class EmulatedReader(PageReader):
    """A :class:`PageReader` whose reads take the time of the drive, beside the computing that goes on meanwhile."""

    def __init__(
        self,
        store: PageStore,
        spec: PageSpec,
        capacity: int,
        ring: int,
        medium: EmulatedMedium,
        clock: Clock,
        fetched: Callable[[int], None],
    ) -> None:
        self._ahead = _Ahead(store, medium)
        super().__init__(self._ahead, spec, capacity, ring)
        self._medium = medium
        self._clock = clock
        self._record_bytes = spec.record_bytes
        self._fetched = fetched
        self._done_s = 0.0

    def request(self, records: list[int], tags: list[int]) -> None:
        """Ask the drive, and start to read."""
        self._settle()  # no thread reads while the faults of the next request are decided
        self._ahead.faults.clear()
        now = self._clock.now
        self._done_s = now
        for part in in_flight(len(records)):
            mine, done = records[part], now
            for start, stop in neighbours(mine):
                done = self._medium.charge_read(done, (stop - start) * self._record_bytes)
            self._done_s = max(self._done_s, done)
            self._ahead.faults[mine[0]] = self._medium.draw()
        super().request(records, tags)

    def _finish(self) -> Bytes:
        rows = super()._finish()
        self._clock.wait_until(self._done_s)
        self._fetched(len(rows))
        return rows
