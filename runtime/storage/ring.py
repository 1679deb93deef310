"""Reads pages from flash ahead of need.

A staging ring of a few slots: while the kernel attends to the pages in one, the others are being filled, so that the medium
always has something to do. A request is a guess that costs nothing when it was wrong: what is taken is compared with what was
asked for, and read again if need be.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import StoreError
from edgekv.spec import RECORD_HEADER_BYTES, PageSpec

from ..kernels.interface import Pool, RecordStreams
from ..meter import SILENT, Meter
from ..system.buffers import aligned_rows
from .interface import Landing, PageStore
from .record import Wanted

Bytes = NDArray[np.uint8]

#: Requests that the staging ring holds where the budget allows: one is attended to, the others are on their way. Source:
#: benchmarks/flash/streaming.py.
RING_PIECES = 11
#: At the least: one is attended to, one on its way; a third lets guesses be right in part.
LEAST_PIECES, LEAST_PIECES_SELECTIVE = 2, 3


@dataclass(frozen=True)
class Request:
    """Records on their way into a slot."""

    wanted: Wanted
    slot: int
    land: Landing


class PageReader:
    """Brings records into a staging ring, ahead of who takes them.

    Args:
        capacity: pages per request at the most.
        ring: requests that the staging ring holds, those included that were taken last; 2 or more.
        pool: checks what came; None: the thread that takes it does.
        meter: is told what is asked for and taken.
    """

    def __init__(
        self,
        store: PageStore,
        spec: PageSpec,
        capacity: int,
        ring: int = 2,
        pool: Pool | None = None,
        meter: Meter = SILENT,
    ) -> None:
        self._store = store
        self._rows = rows = aligned_rows(ring * capacity, spec.record_bytes)
        self._capacity = capacity
        self._stream: RecordStreams | None = None
        self._freed = store.freed
        self._buffers = [rows[slot * capacity : (slot + 1) * capacity] for slot in range(ring)]
        self._free = list(range(ring))
        self._held: list[int] = []
        self._pending: deque[Request] = deque()
        self._addresses = [_payloads(buffer) for buffer in self._buffers]
        self._pool = pool
        self._meter = meter
        meter.ring_opened(ring)

    @property
    def ahead(self) -> int:
        """Requests that have not been taken."""
        return len(self._pending)

    @property
    def has_room(self) -> bool:
        """Whether another request can be made without forgetting one."""
        return bool(self._free)

    def request(self, wanted: Wanted) -> int | None:
        """Start to read records; without room, the oldest request that was not taken is forgotten.

        Returns:
            the slot that they go to; None, with nothing read, when what was taken last fills the ring.
        """
        self.refresh()
        if not self._free:
            if not self._pending:
                return None
            self._forget(self._pending.popleft())
        if self._stream is not None:
            self._stream.forget()
            self._meter.forgot()
        self._meter.asking()
        slot = self._free.pop()
        rows = self._buffers[slot][: len(wanted.records)]
        self._pending.append(Request(wanted, slot, self._store.start(wanted, rows)))
        self._meter.asked(slot)
        return slot

    def take(self, wanted: Wanted) -> tuple[NDArray[np.uint64], Bytes]:
        """Return where the records are, waiting for them if need be; valid until the next take.

        Requests made before the one for these records are forgotten.

        Returns:
            addresses [n] uint64 of the payloads, and the rows they are in.

        Raises:
            CorruptPage, StoreError: a record cannot be read; nothing may be used.
        """
        self.refresh()
        self._release()
        while self._pending and self._pending[0].wanted != wanted:
            self._forget(self._pending.popleft())
        if not self._pending:
            self.request(wanted)
        request = self._pending.popleft()
        self._finish(request)
        count = len(wanted.records)
        return self._addresses[request.slot][:count], self._buffers[request.slot][:count]

    def take_partly(self, wanted: Wanted) -> tuple[NDArray[np.uint64], list[Bytes]]:
        """Do :meth:`take`, but use what was guessed right, and read only the rest.

        Returns:
            addresses [n] uint64 of the payloads, and the rows, one by one.

        Raises:
            CorruptPage, StoreError: a record cannot be read; nothing may be used.
        """
        self.refresh()
        self._release()
        names = list(zip(wanted.records, wanted.tags, strict=True))
        found: dict[tuple[int, int], tuple[np.uint64, Bytes]] = {}
        while self._pending:
            guess = self._pending.popleft()
            # The last free slot is for what is missing.
            if not (self._free or self._pending) or set(names).isdisjoint(
                zip(guess.wanted.records, guess.wanted.tags, strict=True)
            ):
                self._forget(guess)
                continue
            # A guess that failed is read again if it is needed, and fails again.
            with contextlib.suppress(StoreError):
                self._finish(guess)
                found.update(self._found(guess))
        missing = [name for name in names if name not in found]
        if missing:
            self.request(Wanted([name[0] for name in missing], [name[1] for name in missing], wanted.payload_bytes))
            request = self._pending.popleft()
            self._finish(request)
            found.update(self._found(request))
        return np.array([found[name][0] for name in names], np.uint64), [found[name][1] for name in names]

    def stream(self, n_layers: int) -> RecordStreams | None:
        """Return the kernels' way through the ring, if they have one; what either reads ahead, the other forgets."""
        self._stream = self._store.walk(self._rows, self._capacity, n_layers)
        return self._stream

    def refresh(self) -> None:
        """Forget all that was read ahead, by the kernels too, if a record was freed since: another page may be there now."""
        if self._store.freed != self._freed:
            self._freed = self._store.freed
            self.forget()
            if self._stream is not None:
                self._stream.forget()
                self._meter.forgot()

    def forget(self) -> None:
        """Forget the requests that were not taken."""
        while self._pending:
            self._forget(self._pending.popleft())

    def close(self) -> None:
        """Forget everything that is on its way, once it has landed."""
        self.forget()
        if self._stream is not None:
            self._stream.forget()

    def _found(self, request: Request) -> dict[tuple[int, int], tuple[np.uint64, Bytes]]:
        """Return where each record of a finished request is; it stays there until the next take."""
        names = zip(request.wanted.records, request.wanted.tags, strict=True)
        places = zip(self._addresses[request.slot], self._buffers[request.slot], strict=True)
        return dict(zip(names, places, strict=False))

    def _finish(self, request: Request) -> None:
        """Wait for a request; its rows stay as they are until the next take."""
        self._held.append(request.slot)
        request.land(self._pool)
        self._meter.took(request.slot, len(request.wanted.records))

    def _release(self) -> None:
        """Give back the slots of what was taken last."""
        self._free += self._held
        self._held = []

    def _forget(self, request: Request) -> None:
        """Let a request go: an error of a read that nobody needs is nobody's error."""
        with contextlib.suppress(StoreError):
            request.land(self._pool)
        self._free.append(request.slot)


def _payloads(rows: Bytes) -> NDArray[np.uint64]:
    first = rows.ctypes.data + RECORD_HEADER_BYTES
    return np.arange(len(rows), dtype=np.uint64) * np.uint64(rows.strides[0]) + np.uint64(first)
