"""Reads in flight: rows of page files without the interpreter, anything else on Python threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ..kernels.choose import load_kernels
from ..kernels.interface import RowReads, RowStreams
from .record import Wanted, check_records, is_short

#: Reads that are in flight at a time, where threads read: more of them take cores from the computing. io_uring has as many in
#: flight as were asked for. Source: benchmarks/flash/streaming.py.
QUEUE_DEPTH = 4
#: One slot in so many of a staging ring is not asked for while the others are on their way. Virtual drives report what they
#: read when nothing is left to read: then all slots are full at once, and the drive would wait until one was attended to.
SLOTS_PER_SPARE = 5


def most_on_the_way(n_slots: int) -> int:
    """Return how many slots of a staging ring the kernels' walk fills at a time."""
    return n_slots - n_slots // SLOTS_PER_SPARE


class Reads:
    """Reads that go on while the caller computes.

    Args:
        pool: the kernels' threads, which check what came when it is waited for; None: the thread that waits does.
    """

    def __init__(self, pool: object = None) -> None:
        self._rows: RowReads = load_kernels().RowReader(QUEUE_DEPTH, pool)
        self._threads = ThreadPoolExecutor(QUEUE_DEPTH, thread_name_prefix="edgekv-reader")

    def rows(
        self, file: int, places: NDArray[np.int64], wanted: Wanted, out: NDArray[np.uint8]
    ) -> Callable[[], list[bool]]:
        """Start to read records from ``places`` of a file into ``out`` [n, record_bytes] uint8.

        Returns:
            what waits for the end and says for each row whether it is the record that was wanted; it raises the
            system's OSError.
        """
        if is_short(wanted.payload_bytes):
            return self._threads.submit(_read_short, file, places, wanted, out).result
        ticket = self._rows.submit(file, places, out, wanted.heads, wanted.payload_bytes)
        return lambda: [bool(good) for good in self._rows.wait(ticket)]

    def stream(self, rows: NDArray[np.uint8], capacity: int, n_layers: int) -> RowStreams | None:
        """Return what walks the layers of a step by itself, through slots of ``capacity`` rows; None without native kernels."""
        kernels = load_kernels()
        if kernels.isa() == "numpy":
            return None
        stream: RowStreams = kernels.RowStream(
            self._rows, rows, capacity, n_layers, most_on_the_way(len(rows) // capacity)
        )
        return stream

    def call(self, read: Callable[[], None]) -> Callable[[], None]:
        """Start ``read`` on a thread and return what waits for its end and raises what it raised."""
        return self._threads.submit(read).result

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()


def _read_short(file: int, places: NDArray[np.int64], wanted: Wanted, out: NDArray[np.uint8]) -> list[bool]:
    size = out.shape[1]
    came = [os.preadv(file, [row.data], int(place) * size) == size for row, place in zip(out, places, strict=True)]
    good: list[bool] = (check_records(out, wanted.records, wanted.tags, wanted.payload_bytes) & came).tolist()
    return good
