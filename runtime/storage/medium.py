"""Where the bytes of page files go: the system calls of the stores, and the reads that go on while the caller computes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..kernels.choose import load_kernels
from ..kernels.interface import Pool, RecordReads, RecordStreams
from .record import Wanted, check_records, is_short

#: Waits for the end of what was started, and says for each row whether it is the record that was wanted. The rows are checked on
#: the threads of a pool of the kernels; without one, on the thread that waits. Raises the system's OSError.
Arrival = Callable[[Pool | None], list[bool]]

#: Reads that are in flight at a time, where threads read: more of them take cores from the computing. io_uring has as many in
#: flight as were asked for. Source: benchmarks/flash/streaming.py.
QUEUE_DEPTH = 4
#: One slot in so many of a staging ring is not asked for while the others are on their way. Virtual drives report what they
#: read when nothing is left to read: then all slots are full at once, and the drive would wait until one was attended to.
SLOTS_PER_SPARE = 5


def most_on_the_way(n_slots: int) -> int:
    """Return how many slots of a staging ring the kernels' walk fills at a time."""
    return n_slots - n_slots // SLOTS_PER_SPARE


class Medium(Protocol):
    """Reads and writes open files. Each raises OSError as the system does; the stores turn it into their own errors."""

    def read(self, file: int, out: memoryview, offset: int) -> int:
        """Read into ``out`` and return how many bytes came; from any thread."""
        ...

    def start(self, file: int, places: NDArray[np.int64], wanted: Wanted, out: NDArray[np.uint8]) -> Arrival:
        """Start to read records from ``places`` of a file, counted in records, into ``out`` [n, record_bytes] uint8."""
        ...

    def walk(self, rows: NDArray[np.uint8], capacity: int, n_layers: int) -> RecordStreams | None:
        """The native page walk through slots of ``capacity`` rows; None without native kernels."""
        ...

    def write(self, file: int, data: memoryview, offset: int) -> int:
        """Write from ``data`` and return how many bytes went."""
        ...

    def sync(self, file: int) -> None:
        """Make what was written survive a power loss."""
        ...

    def close(self) -> None:
        """End the threads that read, once what is in flight has landed."""
        ...


class SystemMedium:
    """The file system of this machine, as one store uses it; it owns the threads that read for the store."""

    def __init__(self) -> None:
        self._rows: RecordReads | None = None  # once something is read ahead

    def read(self, file: int, out: memoryview, offset: int) -> int:
        """Read as preadv does."""
        return os.preadv(file, [out], offset)

    def start(self, file: int, places: NDArray[np.int64], wanted: Wanted, out: NDArray[np.uint8]) -> Arrival:
        """Start to read records ahead."""
        if is_short(wanted.payload_bytes):
            return _read_short(file, places, wanted, out)
        rows = self._reader()
        ticket = rows.submit(file, places, out, wanted.heads, wanted.payload_bytes)
        return lambda pool: [bool(good) for good in rows.wait(ticket, pool)]

    def walk(self, rows: NDArray[np.uint8], capacity: int, n_layers: int) -> RecordStreams | None:
        """The native page walk, or None without native kernels."""
        kernels = load_kernels()
        if kernels.isa() == "numpy":
            return None
        most = most_on_the_way(len(rows) // capacity)
        walk: RecordStreams = kernels.RecordStream(self._reader(), rows, capacity, n_layers, most)
        return walk

    def write(self, file: int, data: memoryview, offset: int) -> int:
        """Write as pwrite does."""
        return os.pwrite(file, data, offset)

    def sync(self, file: int) -> None:
        """Write back as fsync does."""
        os.fsync(file)

    def close(self) -> None:
        """End the threads."""
        self._rows = None

    def _reader(self) -> RecordReads:
        if self._rows is None:
            self._rows = load_kernels().RecordReader(QUEUE_DEPTH)
        return self._rows


def _read_short(file: int, places: NDArray[np.int64], wanted: Wanted, out: NDArray[np.uint8]) -> Arrival:
    """Read, at once, records too short for the kernels' checksum: those of toys."""
    size = out.shape[1]
    failed: OSError | None = None
    good: list[bool] = []
    try:
        came = [os.preadv(file, [row.data], int(place) * size) == size for row, place in zip(out, places, strict=True)]
        good = (check_records(out, wanted.records, wanted.tags, wanted.payload_bytes) & came).tolist()
    except OSError as error:
        failed = error

    def arrive(pool: Pool | None) -> list[bool]:
        if failed is not None:
            raise failed
        return good

    return arrive
