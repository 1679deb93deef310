"""The drive of an emulated device: real files, computed time, and faults that the stores meet as the system's own errors."""

from __future__ import annotations

import errno
import os
import random

import numpy as np
from numpy.typing import NDArray

from edgekv.device_profiles.flash import FlashDevice
from edgekv.device_profiles.schema import Flash
from edgekv.runtime.kernels.interface import Int64, Pool, RecordStreams
from edgekv.runtime.storage.interface import Bytes
from edgekv.runtime.storage.medium import Arrival, SystemMedium
from edgekv.runtime.storage.record import Wanted, neighbours

from .clock import Clock


class StillStream:
    """A :class:`~edgekv.runtime.kernels.interface.RecordStreams` that moves nothing and counts the reads of what is walked."""

    def __init__(self) -> None:
        self.reads = 0
        self._reads: dict[int, int] = {}

    def plan(
        self,
        layer: int,
        file: int,
        stops: Int64,
        counts: Int64,
        pages: Int64,
        places: Int64,
        heads: Bytes,
        payload_bytes: int,
    ) -> None:
        """Note in how many reads a layer comes."""
        ends = np.cumsum(counts).tolist()
        pieces = [places[end - count : end].tolist() for end, count in zip(ends, counts.tolist(), strict=True)]
        self._reads[layer] = sum(len(list(neighbours(piece))) for piece in pieces if piece)

    def walked(self, layer: int) -> None:
        """Count the reads of a layer."""
        self.reads += self._reads[layer]

    def forget(self) -> None:
        """Nothing was read ahead."""


class EmulatedMedium:
    """A :class:`~edgekv.runtime.storage.medium.Medium` whose requests take the time of a profile's drive.

    Reads ahead are charged when they are asked for, by the thread that runs the app; other threads only move the bytes. So time
    depends on nothing that a scheduler decides.

    Attributes:
        full: every write fails. error_rate, damage_rate: share of the requests that fail, or return a flipped bit.
        still: requests take their time and move nothing, for page files without contents.
    """

    def __init__(self, flash: Flash, clock: Clock, seed: int) -> None:
        self.drive = FlashDevice(flash)
        self.full = False
        self.error_rate = self.damage_rate = 0.0
        self.reads = self.writes = self.faults = 0
        self.still = False
        self._files = SystemMedium()
        self._clock = clock
        self._random = random.Random(seed)
        self.asked_until = 0.0

    def read(self, file: int, out: memoryview, offset: int) -> int:
        """Read, and wait for it."""
        self._clock.wait_until(self.charge_read(self._clock.now, len(out)))
        fault = self.draw()
        if fault == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        got = len(out) if self.still else self._files.read(file, out, offset)
        if fault == "damage":
            out[got // 2] ^= 1
        return got

    def start(self, file: int, places: NDArray[np.int64], wanted: Wanted, out: Bytes) -> Arrival:
        """Ask the drive, and start to read; ``asked_until`` says when it is done, and who takes it waits until then."""
        now = self.asked_until = self._clock.now
        faults = []
        for start, stop in neighbours(places.tolist()):
            self.asked_until = max(self.asked_until, self.charge_read(now, out[start:stop].nbytes))
            faults.append(self.draw())
        arrive = None if self.still else self._files.start(file, places, wanted, out)

        def arrived(pool: Pool | None) -> list[bool]:
            good = arrive(pool) if arrive is not None else [True] * len(places)
            if "error" in faults:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return [*good[:-1], good[-1] and "damage" not in faults]

        return arrived

    def walk(self, rows: Bytes, capacity: int, n_layers: int) -> RecordStreams | None:
        """The native page walk, or one that moves nothing."""
        return StillStream() if self.still else self._files.walk(rows, capacity, n_layers)

    def write(self, file: int, data: memoryview, offset: int) -> int:
        """Write, and wait until the drive took it."""
        if self.full:
            self.faults += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.writes += 1
        self._clock.wait_until(self.drive.write(self._clock.now, len(data)))
        return len(data) if self.still else self._files.write(file, data, offset)

    def sync(self, file: int) -> None:
        """Sync the real file; the time of a flush is in that of the writes."""
        self._files.sync(file)

    def close(self) -> None:
        """End the threads that move the bytes; the drive is there for the next store."""
        self._files.close()

    def charge_read(self, at_s: float, size_bytes: int) -> float:
        """Return when a read that is asked for at ``at_s`` is done."""
        self.reads += 1
        return self.drive.read(at_s, size_bytes)

    @property
    def faulty(self) -> bool:
        """Whether anything may go wrong with a read."""
        return bool(self.error_rate or self.damage_rate)

    def draw(self) -> str:
        """Decide what goes wrong with the next request: ``error``, ``damage``, or nothing."""
        if not self.faulty:
            return ""
        chance = self._random.random()
        fault = "error" if chance < self.error_rate else "damage" if chance < self.error_rate + self.damage_rate else ""
        self.faults += bool(fault)
        return fault
