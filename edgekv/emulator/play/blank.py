"""Parts of a cache without contents: frames, pages and records are counted as ever, and hold nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import cast

import numpy as np

from edgekv.errors import StoreError, StoreFull
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.kernels.interface import Bytes, Float, Kernels
from edgekv.runtime.pages.arena import Arena
from edgekv.runtime.storage.interface import StoreCounters
from edgekv.runtime.storage.reads import Reads
from edgekv.runtime.storage.record import Wanted, neighbours
from edgekv.spec import PageSpec
from edgekv.tiers import Tier

from ..clock import Clock
from ..drive import EmulatedMedium


class BlankArena(Arena):
    """An :class:`Arena` of any size that takes the memory of one frame: all pages lie on each other."""

    def __init__(self, spec: PageSpec, budget_bytes: int) -> None:
        super().__init__(spec, spec.frame_bytes)
        self.n_frames = budget_bytes // spec.frame_bytes
        self._free = list(range(self.n_frames - 1, -1, -1))

    def page(self, offset: int, size_bytes: int) -> Bytes:
        """Return bytes that mean nothing."""
        return self.buffer[:size_bytes]

    def release(self) -> None:
        """Nothing was taken."""


class BlankKernels:
    """The kernels that pages are moved with, moving nothing."""

    RUN_PAGES = load_kernels().RUN_PAGES

    def pack_warm(
        self, hot_page: Bytes | int, out: Bytes | int, n_kv_heads: int, head_dim: int, page_size: int, n_slots: int = -1
    ) -> None:
        """Quantise nothing."""

    def write_hot(self, page: Bytes | int, slot: int, k: Float, v: Float, page_size: int) -> None:
        """Write nothing."""


BLANK_KERNELS = cast(Kernels, BlankKernels())


class BlankStore:
    """A page file without contents: records are given out, and their traffic takes the time of the drive."""

    def __init__(self, spec: PageSpec, medium: EmulatedMedium, clock: Clock) -> None:
        self.counters = StoreCounters()
        self._spec = spec
        self._medium = medium
        self._clock = clock
        self._n_records = 0
        self._free: list[int] = []

    def write(self, tags: list[int], pages: list[Bytes]) -> list[int]:
        """Give out records and wait for the drive to take them.

        Raises:
            StoreFull: the drive is full.
        """
        if self._medium.full:
            self._medium.faults += 1
            raise StoreFull("the drive is full; free some space, raise --kv-budget or lower --context")
        count = len(tags)
        if len(self._free) >= count:
            records, self._free = sorted(self._free[:count]), self._free[count:]
        else:
            records = list(range(self._n_records, self._n_records + count))
            self._n_records += count
        for start, stop in neighbours(records):
            self._medium.writes += 1
            size_bytes = (stop - start) * self._spec.record_bytes
            self._clock.wait_until(self._medium.drive.write(self._clock.now, size_bytes))
            self.counters.bytes_written += size_bytes
        self.counters.records_written += count
        return records

    def read(self, records: list[int], tags: list[int], out: Bytes) -> None:
        """Wait for the drive to read records.

        Raises:
            StoreError: it failed.
        """
        for start, stop in neighbours(records):
            size_bytes = (stop - start) * self._spec.record_bytes
            self._clock.wait_until(self._medium.charge_read(self._clock.now, size_bytes))
            self.counters.bytes_read += size_bytes
            if self._medium.draw():
                raise StoreError(f"cannot read from the offload folder: {os.strerror(errno.EIO)}")
        self.counters.records_read += len(records)

    def start(self, reads: Reads, wanted: Wanted, out: Bytes) -> Callable[[], None]:
        """Wait for the drive at once."""
        return reads.call(lambda: self.read(wanted.records, wanted.tags, out))

    def tier(self, record: int) -> int:
        """Say where a record is."""
        return Tier.COLD

    def free(self, record: int) -> None:
        """Let a record be given out again."""
        self._free.append(record)

    def close(self) -> None:
        """Nothing is open."""


def blank_tokens(count: int) -> Float:
    """Return keys or values of ``count`` tokens that hold nothing [count, 0, 0]."""
    return np.empty((count, 0, 0), np.float32)
