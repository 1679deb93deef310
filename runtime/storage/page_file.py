"""A file of fixed-size records (:mod:`edgekv.runtime.storage.record`): where a page goes in it, how its bytes get there and back.

Reads and writes are explicit (pread/pwrite) into memory that the caller owns, never mapped, and go around the page cache
where the file system can (O_DIRECT): what left memory does not come back as cached file pages. A failed write leaves every page
with its owner and every place free; a record that fails its check is never used and never deleted.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import StoreError, StoreFull, WriteLimit
from edgekv.files import create_file, open_again, open_file
from edgekv.spec import RECORD_ALIGN_BYTES, PageSpec

from ..system.buffers import aligned_rows
from .cipher import Cipher
from .medium import Arrival, Medium
from .record import Wanted, check_records, checksum_of, decrypt, neighbours, pack_record
from .wear import WearLedger

Bytes = NDArray[np.uint8]

#: Records are put together and written in blocks of so many bytes: more would be RAM beyond the budget for nothing.
BLOCK_BYTES = 1024 * 1024


@dataclass(frozen=True)
class FileKind:
    """What the page files of one store have in common.

    Attributes:
        name: of the store, for errors. when_full: what its user can do then.
        cipher: encrypts the payloads. wear: counts what is written, and may refuse it.
    """

    spec: PageSpec
    name: str
    when_full: str
    medium: Medium
    cipher: Cipher | None = None
    wear: WearLedger | None = None


class PageFile:
    """An open page file. Reads may come from any thread, everything else from one.

    Args:
        handle: of the file; closed with this object. direct: another one, which goes around the page cache.
        first: number of its first record.
    """

    def __init__(self, kind: FileKind, handle: int, direct: int | None, first: int = 0) -> None:
        self.handle = handle
        self._kind = kind
        self._direct = direct
        self._first = first
        self._size = kind.spec.record_bytes
        self._n_records = -(-os.fstat(handle).st_size // self._size)
        self._free: list[int] = []

    @classmethod
    def create(cls, path: Path, kind: FileKind, first: int = 0, *, keep: bool = True) -> PageFile:
        """Make a file; without ``keep`` it has no name and is gone with the process, even after a kill.

        Raises:
            OSError: something is there already, or it cannot be made.
        """
        handle = create_file(path)
        direct = _open_direct(path, handle, os.O_RDWR)
        if not keep:
            os.unlink(path)
        return cls(kind, handle, direct, first)

    @classmethod
    def open(cls, path: Path, kind: FileKind, first: int = 0, *, write: bool = True) -> PageFile:
        """Open a file that is there.

        Raises:
            OSError: it cannot be opened, is no plain file, or, for writing, not this user's.
        """
        flags = os.O_RDWR if write else os.O_RDONLY
        handle = open_file(path, flags, linked=True)
        return cls(kind, handle, _open_direct(path, handle, flags), first)

    @property
    def direct(self) -> int:
        """The handle for reads into page-aligned memory; record ``first + i`` is row ``i`` of the file."""
        return self.handle if self._direct is None else self._direct

    @property
    def shared(self) -> bool:
        """Whether the file has another name, and so another owner."""
        return os.fstat(self.handle).st_nlink > 1

    @property
    def n_whole(self) -> int:
        """How many whole records the file is long enough for."""
        return os.fstat(self.handle).st_size // self._size

    def holds(self, record: int) -> bool:
        """Whether the file is long enough for a record."""
        return os.fstat(self.handle).st_size >= (record - self._first + 1) * self._size

    def write(self, tags: list[int], pages: list[Bytes]) -> tuple[list[int], list[int]]:
        """Write pages [<= warm_bytes] uint8 as records, runs of neighbours in one system call.

        Returns:
            the numbers of the records, and their checksums.

        Raises:
            StoreFull: no room. WriteLimit: the day's writes are used up. StoreError: any other failure. In each case
                none of the pages counts as stored, and the caller still has them.
        """
        kind, records = self._kind, self._allocate(len(pages))
        per_block = max(1, BLOCK_BYTES // self._size)
        checks: list[int] = []
        try:
            if kind.wear is not None:
                kind.wear.reserve(len(pages) * self._size)
            for start in range(0, len(pages), per_block):
                part = slice(start, start + per_block)
                checks += self._write_block(records[part], tags[part], pages[part])
        except WriteLimit:
            self._free += records
            raise
        except OSError as error:
            self._free += records
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StoreFull(f"{kind.name} is full; {kind.when_full}") from error
            raise StoreError(f"cannot write to {kind.name}: {error.strerror}") from error
        return records, checks

    def read(self, records: list[int], tags: list[int], out: Bytes) -> list[bool]:
        """Read records into ``out`` [n, record_bytes] uint8, decrypted, and return which of them may be used.

        Rows that lie in page-aligned memory (:func:`aligned_rows`) are read around the page cache.

        Raises:
            OSError: the system refused.
        """
        came = np.zeros(len(records), bool)
        for start, stop in neighbours(records):
            view, offset = out[start:stop].reshape(-1).data, (records[start] - self._first) * self._size
            try:
                got = self._kind.medium.read(self._source(out), view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or self._direct is None:
                    raise
                got = self._kind.medium.read(self.handle, view, offset)
            came[start : start + got // self._size] = True
        good = came & check_records(out[: len(records)], records, tags, self._kind.spec.warm_bytes)
        return self._decrypt(good.tolist(), out)

    def start(self, wanted: Wanted, out: Bytes) -> Arrival:
        """Start to read ``wanted`` into ``out``; what comes back waits for it and does what :meth:`read` does."""
        arrive = self._kind.medium.start(self._source(out), wanted.places - self._first, wanted, out)
        return lambda pool: self._decrypt(arrive(pool), out)

    def free(self, records: Iterable[int]) -> None:
        """Let records be overwritten by later pages."""
        self._free += records

    def keep(self, records: set[int]) -> None:
        """Say which records are in use; all others are free, and the file ends with the last one that is."""
        self._n_records = max((record - self._first for record in records), default=-1) + 1
        self._free = [record for record in range(self._first, self._first + self._n_records) if record not in records]

    def trim(self) -> None:
        """Give the space behind the last record that :meth:`keep` named back to the file system."""
        os.ftruncate(self.handle, self._n_records * self._size)

    def sync(self) -> None:
        """Make every record that was written so far survive a power loss.

        Raises:
            OSError: the medium refused.
        """
        self._kind.medium.sync(self.handle)

    def close(self) -> None:
        """Close the file."""
        os.close(self.handle)
        if self._direct is not None:
            os.close(self._direct)

    def _allocate(self, count: int) -> list[int]:
        # Old holes only when they suffice: a batch at the end of the file is one sequential write.
        if len(self._free) >= count:
            taken = sorted(self._free)[:count]
            gone = set(taken)
            self._free = [record for record in self._free if record not in gone]
            return taken
        first = self._first + self._n_records
        self._n_records += count
        return list(range(first, first + count))

    def _write_block(self, records: list[int], tags: list[int], pages: list[Bytes]) -> list[int]:
        spec = self._kind.spec
        block = aligned_rows(len(pages), self._size)
        for row, record, tag, page in zip(block, records, tags, pages, strict=True):
            pack_record(row, record, tag, page, spec.warm_bytes, self._kind.cipher)
        for start, stop in neighbours(records):
            self._pwrite(block[start:stop].reshape(-1).data, (records[start] - self._first) * self._size)
        return [checksum_of(row) for row in block]

    def _pwrite(self, view: memoryview, offset: int) -> None:
        medium = self._kind.medium
        while view:
            try:
                written = medium.write(self.direct, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or self._direct is None:
                    raise
                # Not aligned any more (the last write was cut short) or refused: through the page cache, which says why.
                written = medium.write(self.handle, view, offset)
            offset += written
            view = view[written:]

    def _source(self, out: Bytes) -> int:
        return self.direct if out.ctypes.data % RECORD_ALIGN_BYTES == 0 else self.handle

    def _decrypt(self, good: list[bool], out: Bytes) -> list[bool]:
        kind = self._kind
        if kind.cipher is None:
            return good
        return [ok and decrypt(row, kind.spec.warm_bytes, kind.cipher) for ok, row in zip(good, out, strict=False)]


def _open_direct(path: Path, handle: int, flags: int) -> int | None:
    """Open a file around the page cache, where system and file system can."""
    return open_again(path, handle, flags | os.O_DIRECT) if hasattr(os, "O_DIRECT") else None
