"""The drive: when a request that is made now will be done, and what it costs the medium.

The model is NVMeVirt's, in short: a request waits for a free place in the queue and for its turn under the IOPS limit, takes
``t0``, then its bytes share one channel. Writes end when they are in the buffer, which drains at the sustained rate.
"""

from __future__ import annotations

import heapq

from .schema import Flash

SECONDS_PER_DAY = 86_400
DAYS_PER_YEAR = 365.25
TERABYTE = 1e12


class FlashDevice:
    """One drive on a clock that the caller keeps: no waiting, no randomness.

    Args:
        flash: what the profile says of the drive.
    """

    def __init__(self, flash: Flash) -> None:
        self._flash = flash
        self._read_t0_s = flash.read_t0_s.value
        self._read_bytes_per_s = flash.read_bytes_per_s.value
        self._turn_s = 1.0 / flash.iops_limit.value
        self._free = [0.0] * flash.queue_depth.value  # a heap: when each place in the queue is free again
        self._next_request = self._read_channel = self._drained = 0.0
        self.bytes_read = self.bytes_written = 0

    def read(self, now: float, size_bytes: int) -> float:
        """Return when a read of ``size_bytes`` that is asked for at ``now`` seconds is done."""
        ready = self._start(now) + self._read_t0_s
        done = max(ready, self._read_channel) + size_bytes / self._read_bytes_per_s
        self._read_channel = done
        self.bytes_read += size_bytes
        return self._finish(done)

    def write(self, now: float, size_bytes: int) -> float:
        """Return when a write of ``size_bytes`` that is asked for at ``now`` seconds is accepted."""
        rate = self._flash.write_bytes_per_s.value
        ready = self._start(now) + self._flash.write_t0_s.value
        self._drained = max(self._drained, ready) + size_bytes / rate
        self.bytes_written += size_bytes
        return self._finish(max(ready, self._drained - self._flash.write_buffer_bytes.value / rate))

    @property
    def wear_share(self) -> float:
        """Share of the endurance that the bytes written so far have used."""
        return wear_bytes(self._flash, self.bytes_written) / (self._flash.endurance_tbw.value * TERABYTE)

    def _start(self, now: float) -> float:
        start = max(now, heapq.heappop(self._free), self._next_request)
        self._next_request = start + self._turn_s
        return start

    def _finish(self, done: float) -> float:
        heapq.heappush(self._free, done)
        return done


def wear_bytes(flash: Flash, bytes_written: float) -> float:
    """Return the bytes that the medium programs for so many bytes written."""
    return bytes_written * flash.write_amplification.value


def years_of_life(flash: Flash, bytes_per_day: float) -> float:
    """Return how long the drive endures so much writing per day; infinite for none.

    TBW = cycles x capacity / write amplification (JEDEC); the profile's rating is for writes without amplification.
    """
    if bytes_per_day == 0:
        return float("inf")
    return flash.endurance_tbw.value * TERABYTE / wear_bytes(flash, bytes_per_day) / DAYS_PER_YEAR


def streamed_seconds(flash: Flash, size_bytes: float, request_bytes: float) -> float:
    """Return the time to read ``size_bytes`` in requests of ``request_bytes`` with the queue kept full."""
    if size_bytes == 0:
        return 0.0
    requests = size_bytes / request_bytes
    transfer = size_bytes / flash.read_bytes_per_s.value
    turns = (requests * flash.read_t0_s.value + transfer) / flash.queue_depth.value
    return max(transfer + flash.read_t0_s.value, turns, requests / flash.iops_limit.value)
