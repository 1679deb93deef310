"""Two stores as one: flash over an object store, and a session that is only read under what a run writes.

Nothing moves between the two: a page is written once, to where it stays until it is freed, so that flash sees no more
writes than without an object store, and none of a page that is REMOTE.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import StoreError, StoreFull

from ..kernels.interface import Pool, RecordStreams
from .interface import Landing, PageStore, StoreCounters
from .record import Wanted

Bytes = NDArray[np.uint8]


class TwoStores:
    """A :class:`~edgekv.runtime.storage.interface.PageStore` over two others; who inherits says which of them takes a page."""

    #: Added to the number of a record in the second store; above all numbers in the first.
    _SECOND = 1 << 48

    def __init__(self, first: PageStore, second: PageStore | None) -> None:
        self._first = first
        self._second = second

    @property
    def counters(self) -> StoreCounters:
        """What both have done."""
        return self._first.counters + self._second.counters if self._second is not None else self._first.counters

    @property
    def freed(self) -> int:
        """How often records of either became free to be overwritten."""
        return self._first.freed + (self._second.freed if self._second is not None else 0)

    def read(self, records: list[int], tags: list[int], out: Bytes) -> None:
        """Read records into ``out`` [n, record_bytes] uint8, checked; from any thread.

        Raises:
            CorruptPage, StoreError: a record cannot be had; ``out`` must not be used.
        """
        start = 0
        for stop in range(1, len(records) + 1):
            if stop == len(records) or (records[stop] >= self._SECOND) != (records[start] >= self._SECOND):
                store, base = self._at(records[start])
                store.read([record - base for record in records[start:stop]], tags[start:stop], out[start:stop])
                start = stop

    def start(self, wanted: Wanted, out: Bytes) -> Landing:
        """Start to read, from both at once; see :class:`PageStore`."""
        landings = []
        for second, part, rows in wanted.split(lambda record: record >= self._SECOND):
            store, base = self._at(self._SECOND if second else 0)
            landings.append(store.start(part.shifted(base) if base else part, out[rows]))

        def land(pool: Pool | None) -> None:
            failed: StoreError | None = None
            for one in landings:  # all of them, also when one fails
                try:
                    one(pool)
                except StoreError as error:
                    failed = error
            if failed is not None:
                raise failed

        return land

    def walk(self, rows: Bytes, capacity: int, n_layers: int) -> RecordStreams | None:
        """None: the records are not in one file."""
        return None

    def free(self, record: int) -> None:
        """Forget a record."""
        store, base = self._at(record)
        store.free(record - base)

    def tier(self, record: int) -> int:
        """Return COLD or REMOTE."""
        store, base = self._at(record)
        return store.tier(record - base)

    def _at(self, record: int) -> tuple[PageStore, int]:
        if record < self._SECOND:
            return self._first, 0
        assert self._second is not None
        return self._second, self._SECOND

    def _write_second(self, tags: list[int], pages: list[Bytes]) -> list[int]:
        assert self._second is not None
        return [record + self._SECOND for record in self._second.write(tags, pages)]


class LayeredStore(TwoStores):
    """Flash as long as it has room, and an object store beyond.

    Args:
        flash_records: records that flash takes at the most.
    """

    def __init__(self, flash: PageStore, remote: PageStore, flash_records: int) -> None:
        super().__init__(flash, remote)
        self._remote = remote
        self._room = flash_records

    def write(self, tags: list[int], pages: list[Bytes]) -> list[int]:
        """Write as many pages to flash as fit there, and the rest to the object store.

        Raises:
            StoreError: one of them failed; none of the pages counts as stored.
        """
        count = min(self._room, len(pages))
        records: list[int] = []
        if count:
            try:
                records = self._first.write(tags[:count], pages[:count])
            except StoreFull:
                self._room = count = 0  # the medium is full below the limit that was set for it
        self._room -= count
        if count < len(pages):
            try:
                records += self._write_second(tags[count:], pages[count:])
            except StoreError:
                for record in records:
                    self.free(record)
                raise
        return records

    def free(self, record: int) -> None:
        """Forget a record; room on flash can be used again."""
        super().free(record)
        self._room += record < self._SECOND

    def close(self) -> None:
        """Close both."""
        try:
            self._first.close()
        finally:
            self._remote.close()


class OverlaidStore(TwoStores):
    """The pages of a session that may only be read, which stays open, and a store that takes what a run writes.

    Args:
        opened: opens that store, at the first write at the latest.
    """

    _SECOND = 1 << 61

    def __init__(self, session: PageStore, opened: Callable[[], PageStore]) -> None:
        super().__init__(session, None)
        self._opened = opened

    def open(self) -> None:
        """Open the store for what is written now.

        Raises:
            StoreError: it cannot be opened.
        """
        if self._second is None:
            self._second = self._opened()

    def write(self, tags: list[int], pages: list[Bytes]) -> list[int]:
        """Write pages beside the session.

        Raises:
            StoreError: it failed, or the store cannot be opened; none of the pages counts as stored.
        """
        self.open()
        return self._write_second(tags, pages)

    def close(self) -> None:
        """Close the store for what was written."""
        if self._second is not None:
            self._second.close()
