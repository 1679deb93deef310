"""Reads pages from flash ahead of need, on threads of its own.

Two buffers: while the kernel attends to the pages in one, the next pages are read into the other. A request is a guess
that costs nothing when it was wrong: what is taken is compared with what was asked for, and read again if need be. A third
buffer lets a guess be right in part: what it lacks is read beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import StoreError
from edgekv.runtime.store import PageStore, aligned_rows
from edgekv.spec import RECORD_HEADER_BYTES, PageSpec

Bytes = NDArray[np.uint8]

#: Reads in flight: flash needs several to be busy all the time.
QUEUE_DEPTH = 4


class PageReader:
    """Brings records into a small staging ring, one request ahead.

    Args:
        capacity: pages per request at the most.
        ring: requests that the staging ring holds, 2 or 3; with 3, guesses may be right in part.
    """

    def __init__(self, store: PageStore, spec: PageSpec, capacity: int, ring: int = 2) -> None:
        self._store = store
        self._buffers = [aligned_rows(capacity, spec.record_bytes) for _ in range(ring)]
        self._payload = spec.warm_bytes
        self._next = 0
        self._pending: tuple[list[int], list[int], Bytes, list[Future[None]]] | None = None
        self._threads = ThreadPoolExecutor(QUEUE_DEPTH, thread_name_prefix="edgekv-reader")

    def request(self, records: list[int], tags: list[int]) -> None:
        """Start to read records; an earlier request that was not taken is forgotten."""
        self._settle()
        rows = self._buffers[self._next][: len(records)]
        self._next = (self._next + 1) % len(self._buffers)
        reads = [
            self._threads.submit(self._store.read, records[part], tags[part], rows[part])
            for part in in_flight(len(records))
        ]
        self._pending = (records, tags, rows, reads)

    def take(self, records: list[int], tags: list[int]) -> tuple[NDArray[np.uint64], Bytes]:
        """Return where the records are, waiting for them if need be; valid until the request after the next.

        Returns:
            addresses [n] uint64 of the payloads, and the rows they are in.

        Raises:
            CorruptPage, StoreError: a record cannot be read; nothing may be used.
        """
        if self._pending is None or self._pending[:2] != (records, tags):
            self.request(records, tags)
        rows = self._finish()
        return _payloads(rows), rows

    def take_partly(self, records: list[int], tags: list[int]) -> tuple[NDArray[np.uint64], list[Bytes]]:
        """Do :meth:`take`, but use what was guessed right, and read only the rest; for a ring of 3.

        Returns:
            addresses [n] uint64 of the payloads, and the rows, one by one.

        Raises:
            CorruptPage, StoreError: a record cannot be read; nothing may be used.
        """
        found: dict[tuple[int, int], tuple[np.uint64, Bytes]] = {}

        def arrived(names: Iterable[tuple[int, int]]) -> None:
            rows = self._finish()
            found.update(zip(names, zip(_payloads(rows), rows, strict=True), strict=True))

        if self._pending is not None:
            # A guess that failed is read again if it is needed, and fails again.
            with contextlib.suppress(StoreError):
                arrived(list(zip(*self._pending[:2], strict=True)))
        names = list(zip(records, tags, strict=True))
        missing = [name for name in names if name not in found]
        if missing:
            self.request([record for record, _ in missing], [tag for _, tag in missing])
            arrived(missing)
        return np.array([found[name][0] for name in names], np.uint64), [found[name][1] for name in names]

    def _finish(self) -> Bytes:
        """Wait for what was requested and return its rows."""
        assert self._pending is not None
        _, _, rows, reads = self._pending
        wait(reads)
        self._pending = None
        for read in reads:
            read.result()
        return rows

    def close(self) -> None:
        """End the threads."""
        self._settle()
        self._threads.shutdown()

    def _settle(self) -> None:
        if self._pending is not None:
            wait(self._pending[3])  # an error of a read that nobody needs is nobody's error
            self._pending = None


def in_flight(count: int) -> list[slice]:
    """Cut a request for ``count`` records into the reads that are in flight at a time."""
    share = -(-count // QUEUE_DEPTH)
    return [slice(start, start + share) for start in range(0, count, share)]


def _payloads(rows: Bytes) -> NDArray[np.uint64]:
    first = rows.ctypes.data + RECORD_HEADER_BYTES
    return np.arange(len(rows), dtype=np.uint64) * np.uint64(rows.strides[0]) + np.uint64(first)
