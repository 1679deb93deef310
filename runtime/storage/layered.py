"""Flash over an object store: pages go to flash as long as it has room, and to the object store beyond.

Nothing moves between the two: a page is written once, to where it stays until it is freed, so that flash sees no more
writes than without an object store, and none of a page that is REMOTE.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import StoreError, StoreFull

from .interface import PageStore
from .reads import Reads
from .record import Wanted

Bytes = NDArray[np.uint8]

#: Added to the number of a record in the object store.
REMOTE = 1 << 48


class LayeredStore:
    """A :class:`~edgekv.runtime.storage.interface.PageStore` over two others, which count into one set of counters.

    Args:
        flash_records: records that flash takes at the most.
    """

    def __init__(self, flash: PageStore, remote: PageStore, flash_records: int) -> None:
        self.counters = remote.counters = flash.counters
        self._flash = flash
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
                records = self._flash.write(tags[:count], pages[:count])
            except StoreFull:
                self._room = count = 0  # the medium is full below the limit that was set for it
        self._room -= count
        if count < len(pages):
            try:
                records += [record + REMOTE for record in self._remote.write(tags[count:], pages[count:])]
            except StoreError:
                for record in records:
                    self.free(record)
                raise
        return records

    def read(self, records: list[int], tags: list[int], out: Bytes) -> None:
        """Read records into ``out`` [n, record_bytes] uint8, checked; from any thread.

        Raises:
            CorruptPage, StoreError: a record cannot be had; ``out`` must not be used.
        """
        start = 0
        for stop in range(1, len(records) + 1):
            if stop == len(records) or (records[stop] >= REMOTE) != (records[start] >= REMOTE):
                store, base = self._at(records[start])
                store.read([record - base for record in records[start:stop]], tags[start:stop], out[start:stop])
                start = stop

    def start(self, reads: Reads, wanted: Wanted, out: Bytes) -> Callable[[], None]:
        """Start to read; see :class:`PageStore`. Records that are all on flash are read there."""
        stores = {self._at(record)[0] for record in wanted.records}
        if stores == {self._flash}:
            return self._flash.start(reads, wanted, out)
        return reads.call(lambda: self.read(wanted.records, wanted.tags, out))

    def free(self, record: int) -> None:
        """Forget a record; room on flash can be used again."""
        store, base = self._at(record)
        store.free(record - base)
        if store is self._flash:
            self._room += 1

    def tier(self, record: int) -> int:
        """Return COLD or REMOTE."""
        store, base = self._at(record)
        return store.tier(record - base)

    def close(self) -> None:
        """Close both."""
        try:
            self._flash.close()
        finally:
            self._remote.close()

    def _at(self, record: int) -> tuple[PageStore, int]:
        return (self._remote, REMOTE) if record >= REMOTE else (self._flash, 0)
