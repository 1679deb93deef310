"""Reads pages from flash ahead of need, on threads of its own.

Two buffers: while the kernel attends to the pages in one, the next pages are read into the other. A request is a guess
that costs nothing when it was wrong: what is taken is compared with what was asked for, and read again if need be.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
from numpy.typing import NDArray

from edgekv.runtime.store import PageStore, aligned_rows
from edgekv.spec import RECORD_HEADER_BYTES, PageSpec

Bytes = NDArray[np.uint8]

#: Reads in flight: flash needs several to be busy all the time.
QUEUE_DEPTH = 4


class PageReader:
    """Brings records into a small staging ring, one request ahead.

    Args:
        capacity: pages per request at the most; the ring holds two requests.
    """

    def __init__(self, store: PageStore, spec: PageSpec, capacity: int) -> None:
        self._store = store
        self._buffers = [aligned_rows(capacity, spec.record_bytes) for _ in range(2)]
        self._payload = spec.warm_bytes
        self._next = 0
        self._pending: tuple[list[int], list[int], Bytes, list[Future[None]]] | None = None
        self._threads = ThreadPoolExecutor(QUEUE_DEPTH, thread_name_prefix="edgekv-reader")

    def request(self, records: list[int], tags: list[int]) -> None:
        """Start to read records; an earlier request that was not taken is forgotten."""
        self._settle()
        rows = self._buffers[self._next][: len(records)]
        self._next ^= 1
        share = -(-len(records) // QUEUE_DEPTH)
        parts = [slice(start, start + share) for start in range(0, len(records), share)]
        reads = [self._threads.submit(self._store.read, records[part], tags[part], rows[part]) for part in parts]
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
        assert self._pending is not None
        _, _, rows, reads = self._pending
        wait(reads)
        self._pending = None
        for read in reads:
            read.result()
        first = rows.ctypes.data + RECORD_HEADER_BYTES
        return np.arange(len(records), dtype=np.uint64) * np.uint64(rows.strides[0]) + np.uint64(first), rows

    def close(self) -> None:
        """End the threads."""
        self._settle()
        self._threads.shutdown()

    def _settle(self) -> None:
        if self._pending is not None:
            wait(self._pending[3])  # an error of a read that nobody needs is nobody's error
            self._pending = None
