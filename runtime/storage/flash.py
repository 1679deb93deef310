"""The flash tier: a page file of fixed-size records (:mod:`edgekv.runtime.storage.record`), one per page.

Reads and writes are explicit (pread/pwrite) into memory that the caller owns, never mapped, and go around the page cache
where the file system can (O_DIRECT): what left memory does not come back as cached file pages. A page is written once.
A record that fails its check is never used and never deleted. The file is unlinked as soon as it is open, so that nothing
is left behind, not even after a kill; the folder's lock keeps a second process out.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import CorruptPage, StoreError, StoreFull, StoreLocked, WriteLimit
from edgekv.spec import RECORD_ALIGN_BYTES, PageSpec
from edgekv.tiers import Tier

from ..system.buffers import aligned_rows
from .interface import StoreCounters
from .medium import SYSTEM, Medium
from .reads import Reads
from .record import Wanted, check_records, neighbours, pack_record
from .wear import WearLedger

if sys.platform != "win32":
    import fcntl

Bytes = NDArray[np.uint8]


#: Records are put together and written in blocks of so many bytes: more would be RAM beyond the budget for nothing.
BLOCK_BYTES = 1024 * 1024


def _open_direct(path: Path) -> int | None:
    """Open a file around the page cache, where system and file system can."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None


class FlashStore:
    """A :class:`PageStore` in one file of a folder.

    Args:
        wear: counts what is written, and may refuse it; the store closes it.

    Raises (from the constructor):
        StoreLocked: another process uses the folder.
        StoreError: the folder cannot be written.
    """

    def __init__(self, folder: Path, spec: PageSpec, medium: Medium = SYSTEM, wear: WearLedger | None = None) -> None:
        self.folder = folder
        self.spec = spec
        self._medium = medium
        self.counters = StoreCounters()
        self._wear = wear
        self._n_records = 0
        self._free: list[int] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(
                f"cannot write the offload folder {folder}: {error.strerror}; choose another with --offload DIR"
            ) from error
        if sys.platform != "win32":
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._lock)
                raise StoreLocked(
                    f"another process uses the offload folder {folder}; give each process its own with --offload DIR"
                ) from error
        path = folder / f"pages-{os.getpid()}.bin"
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            self._direct = _open_direct(path)
            os.unlink(path)
        except OSError as error:
            os.close(self._lock)
            raise StoreError(
                f"cannot write the offload folder {folder}: {error.strerror}; choose another with --offload DIR"
            ) from error

    def write(self, tags: list[int], pages: list[Bytes]) -> list[int]:
        """Write pages as records, runs of neighbours in one system call.

        Args:
            tags: what identifies each page.
            pages: each [warm_bytes] uint8.

        Raises:
            StoreFull: no room; none of the pages counts as stored, and the caller still has them.
            WriteLimit, StoreError: the day's writes are used up, or any other failure, likewise.
        """
        records = self._allocate(len(pages))
        per_block = max(1, BLOCK_BYTES // self.spec.record_bytes)
        try:
            if self._wear is not None:
                self._wear.reserve(len(pages) * self.spec.record_bytes)
            for start in range(0, len(pages), per_block):
                part = slice(start, start + per_block)
                self._write_block(records[part], tags[part], pages[part])
        except WriteLimit:
            self._free.extend(reversed(records))
            raise
        except OSError as error:
            self._free.extend(reversed(records))
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StoreFull(
                    f"the offload folder {self.folder} is full; free some space, choose another with --offload DIR,"
                    " raise --kv-budget or lower --context"
                ) from error
            raise StoreError(f"cannot write to the offload folder {self.folder}: {error.strerror}") from error
        self.counters.records_written += len(records)
        self.counters.bytes_written += len(records) * self.spec.record_bytes
        return records

    def _write_block(self, records: list[int], tags: list[int], pages: list[Bytes]) -> None:
        size = self.spec.record_bytes
        block = aligned_rows(len(pages), size)
        for row, record, tag, page in zip(block, records, tags, pages, strict=True):
            pack_record(row, record, tag, page, self.spec.warm_bytes, None)
        for start, stop in neighbours(records):
            self._pwrite(block[start:stop].reshape(-1), records[start] * size)

    def read(self, records: list[int], tags: list[int], out: Bytes) -> None:
        """Read records into ``out`` [n, record_bytes] uint8, as they are on flash; neighbours in one system call.

        The payload of row ``i`` is ``out[i, RECORD_HEADER_BYTES:][: spec.warm_bytes]``. Safe to call from another thread
        than ``write``. Rows that lie in page-aligned memory (:func:`aligned_rows`) are read around the page cache.

        Raises:
            CorruptPage: a record is not what was written; ``out`` must not be used.
            StoreError: the read failed.
        """
        size = self.spec.record_bytes
        file = self._source(out)
        for start, stop in neighbours(records):
            try:
                got = self._medium.read(file, out[start:stop].reshape(-1).data, records[start] * size)
            except OSError as error:
                raise self.unreadable(error) from error
            if got != (stop - start) * size:
                raise CorruptPage(f"the page file in {self.folder} is shorter than what was written to it")
        self.count(records, tags, check_records(out[: len(records)], records, tags, self.spec.warm_bytes).tolist())

    def start(self, reads: Reads, wanted: Wanted, out: Bytes) -> Callable[[], None]:
        """Start to read ``wanted`` into ``out``, and return what waits for it; see :class:`PageStore`."""
        finish = self._medium.start(reads, self._source(out), wanted.places, wanted, out)

        def finished() -> None:
            try:
                good = finish()
            except OSError as error:
                raise self.unreadable(error) from error
            self.count(wanted.records, wanted.tags, good)

        return finished

    @property
    def direct(self) -> int:
        """The open file, record ``i`` in row ``i``, for reads into page-aligned memory."""
        return self._file if self._direct is None else self._direct

    def unreadable(self, error: OSError) -> StoreError:
        """Return what a read that the system refused means to a user."""
        return StoreError(f"cannot read from the offload folder {self.folder}: {error.strerror}")

    def _source(self, out: Bytes) -> int:
        return self.direct if out.ctypes.data % RECORD_ALIGN_BYTES == 0 else self._file

    def count(self, records: list[int], tags: list[int], good: list[bool]) -> None:
        """Count what was read, if all of it is good.

        Raises:
            CorruptPage: it is not; the message names the first record that is bad.
        """
        if not all(good):
            index = good.index(False)
            if os.fstat(self._file).st_size < (records[index] + 1) * self.spec.record_bytes:
                raise CorruptPage(f"the page file in {self.folder} is shorter than what was written to it")
            raise CorruptPage(
                f"record {records[index]} in {self.folder} (layer {tags[index] >> 32}, page {tags[index] & 0xFFFFFFFF}) differs"
                " from its checksum; it was not used. Run the prompt again; if this comes back, the medium is failing"
            )
        self.counters.reads += sum(1 for _ in neighbours(records))
        self.counters.records_read += len(records)
        self.counters.bytes_read += len(records) * self.spec.record_bytes

    def free(self, record: int) -> None:
        """Let a record be overwritten by a later page."""
        self._free.append(record)

    def tier(self, record: int) -> int:
        """Return COLD: everything here is on flash."""
        return Tier.COLD

    def close(self) -> None:
        """Close the file and the lock; the space goes back to the file system."""
        os.close(self._file)
        if self._direct is not None:
            os.close(self._direct)
        os.close(self._lock)
        if self._wear is not None:
            self._wear.close()

    def _allocate(self, count: int) -> list[int]:
        # Old holes only when they suffice: a batch at the end of the file is one sequential write.
        if len(self._free) >= count:
            taken = sorted(self._free)[:count]
            gone = set(taken)
            self._free = [record for record in self._free if record not in gone]
            return taken
        first = self._n_records
        self._n_records += count
        return list(range(first, first + count))

    def _pwrite(self, data: Bytes, offset: int) -> None:
        view = data.data
        while view:
            try:
                written = self._medium.write(self._file if self._direct is None else self._direct, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or self._direct is None:
                    raise
                # Not aligned any more (the last write was cut short) or refused: through the page cache, which says why.
                written = self._medium.write(self._file, view, offset)
            offset += written
            view = view[written:]
