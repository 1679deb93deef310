"""The page files of a session: a :class:`~edgekv.runtime.storage.interface.PageStore` whose records stay.

Records have the format of :mod:`edgekv.runtime.storage.record`, in segment files ``pages-00000001.bin`` and up; a record's number
is ``segment << 32 | place in the segment``. Invariants: a record that the last commit refers to is never overwritten; what
is read is compared with the checksum that the index holds, so that an old index never gets a newer record; a
segment that another session shares (by a hard link) is only read, new records go to a new one.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import CorruptPage, StoreError, StoreFull, WriteLimit
from edgekv.spec import PageSpec
from edgekv.tiers import Tier

from .cipher import Cipher
from .interface import StoreCounters
from .medium import SYSTEM, Medium
from .reads import Reads
from .record import Wanted, check_records, checksum_of, decrypt, neighbours, pack_record
from .wear import WearLedger

Bytes = NDArray[np.uint8]
_SEGMENT = re.compile(r"pages-(\d{8})\.bin")
_BATCH_RECORDS = 128
_PLACE = 0xFFFFFFFF  # of a record in its segment


@dataclass
class _Segment:
    file: int
    n_records: int
    writable: bool


def segment_paths(folder: Path) -> dict[int, Path]:
    """Return the segment files of a session folder by their number."""
    found = ((_SEGMENT.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in sorted(found, key=lambda pair: pair[1].name) if match}


class SessionStore:
    """The records of one session folder.

    Args:
        spill: where new records go instead; for sessions that cannot be written. They are not kept.
        wear: counts what is written, and may refuse it; the store closes it.

    Raises (from the constructor):
        StoreError: a file cannot be opened.
    """

    def __init__(
        self,
        folder: Path,
        spec: PageSpec,
        cipher: Cipher | None = None,
        spill: Path | None = None,
        medium: Medium = SYSTEM,
        wear: WearLedger | None = None,
    ) -> None:
        self.folder = folder
        self.medium = medium
        self.spec = spec
        self.counters = StoreCounters()
        self.cipher = cipher
        self._spill = spill
        self._wear = wear
        self._segments: dict[int, _Segment] = {}
        self._checks: dict[int, int] = {}
        self._committed: set[int] = set()
        self._released: set[int] = set()
        self._free: list[int] = []
        self._dirty = False
        self._failed = False
        mode = os.O_RDONLY if spill is not None else os.O_RDWR
        try:
            for number, path in segment_paths(folder).items():
                file = os.open(path, mode | os.O_CLOEXEC)
                status = os.fstat(file)
                records = -(-status.st_size // spec.record_bytes)
                self._segments[number] = _Segment(file, records, spill is None and status.st_nlink == 1)
        except OSError as error:
            self.close()
            raise StoreError(f"cannot open the pages of the session {folder}: {error.strerror}") from error

    # -- records -----------------------------------------------------------------------------------------------

    def adopt(self, records: Iterable[int], checks: Iterable[int]) -> None:
        """Take over records that the index refers to; all others are free."""
        self._checks = dict(zip(records, checks, strict=True))
        self._committed = set(self._checks)
        for number, segment in self._segments.items():
            if segment.writable:
                last = max((record & 0xFFFFFFFF for record in self._checks if record >> 32 == number), default=-1)
                segment.n_records = last + 1
                self._free += [
                    record for record in range(number << 32, (number << 32) + last + 1) if record not in self._checks
                ]

    def check_of(self, record: int) -> int:
        """Return the checksum of a record that was adopted or written."""
        return self._checks[record]

    def write(self, tags: list[int], pages: list[Bytes]) -> list[int]:
        """Write pages [<= warm_bytes] uint8 as records and return their numbers; see :class:`PageStore`.

        Raises:
            StoreFull, StoreError: none of the pages counts as stored, and the caller still has them.
        """
        written: list[int] = []
        for start in range(0, len(pages), _BATCH_RECORDS):
            stop = start + _BATCH_RECORDS
            try:
                written += self._write(tags[start:stop], pages[start:stop])
            except StoreError:
                self._free += written
                raise
        return written

    def _write(self, tags: list[int], pages: list[Bytes]) -> list[int]:
        records = self._allocate(len(pages))
        size = self.spec.record_bytes
        block = np.zeros((len(pages), size), np.uint8)
        for row, record, tag, page in zip(block, records, tags, pages, strict=True):
            pack_record(row, record, tag, page, self.spec.warm_bytes, self.cipher)
        try:
            if self._wear is not None:
                self._wear.reserve(block.nbytes)
            for start, stop in neighbours(records):
                self._pwrite(block[start:stop].reshape(-1).data, records[start])
        except WriteLimit:
            self._free += records
            raise
        except OSError as error:
            self._free += records
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StoreFull(
                    f"no room to write the session {self.folder}; free some space, remove old sessions (edgekv sessions"
                    " list, rm) or compact this one (edgekv sessions compact)"
                ) from error
            raise StoreError(f"cannot write the session {self.folder}: {error.strerror}") from error
        for row, record in zip(block, records, strict=True):
            self._checks[record] = checksum_of(row)
        self._dirty = True
        self.counters.records_written += len(records)
        self.counters.bytes_written += block.nbytes
        return records

    def read(self, records: list[int], tags: list[int], out: Bytes) -> None:
        """Read records into ``out`` [n, record_bytes] uint8, checked and decrypted; see :class:`PageStore`.

        Raises:
            CorruptPage: a record is not what the index says; ``out`` must not be used. StoreError: the read failed.
        """
        self._refuse_bad(records, tags, self.try_read(records, tags, out))

    def _refuse_bad(self, records: list[int], tags: list[int], usable: list[bool]) -> None:
        for index, good in enumerate(usable):
            if not good:
                raise CorruptPage(
                    f"record {records[index] & 0xFFFFFFFF} of the session {self.folder} (layer {tags[index] >> 32}, page"
                    f" {tags[index] & 0x3FFFFFFF}) differs from its checksum; it was not used. Run again: what is before"
                    " it will be reused, the rest computed. If this comes back, the medium is failing"
                )

    def try_read(self, records: list[int], tags: list[int], out: Bytes) -> list[bool]:
        """Read records and return for each row whether it may be used.

        Raises:
            StoreError: the medium refused (an input/output error counts as a bad record instead).
        """
        size = self.spec.record_bytes
        whole = np.zeros(len(records), bool)
        for start, stop in neighbours(records):
            got = 0
            segment = self._segments.get(records[start] >> 32)
            if segment is not None:
                try:
                    view = out[start:stop].reshape(-1).data
                    got = self.medium.read(segment.file, view, (records[start] & _PLACE) * size)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise StoreError(f"cannot read the session {self.folder}: {error.strerror}") from error
            whole[start : start + got // size] = True
        good = whole & check_records(out[: len(records)], records, tags, self.spec.warm_bytes)
        return self._usable(records, good.tolist(), out)

    def start(self, reads: Reads, wanted: Wanted, out: Bytes) -> Callable[[], None]:
        """Start to read ``wanted`` into ``out``, and return what waits for it; see :class:`PageStore`."""
        number = wanted.records[0] >> 32
        if number not in self._segments or any(record >> 32 != number for record in wanted.records):
            return reads.call(lambda: self.read(wanted.records, wanted.tags, out))
        finish = self.medium.start(reads, self._segments[number].file, wanted.places & _PLACE, wanted, out)

        def finished() -> None:
            try:
                good = finish()
            except OSError as error:
                raise StoreError(f"cannot read the session {self.folder}: {error.strerror}") from error
            self._refuse_bad(wanted.records, wanted.tags, self._usable(wanted.records, good, out))

        return finished

    def _usable(self, records: list[int], good: list[bool], out: Bytes) -> list[bool]:
        """Decrypt the good rows, count them, and return which may be used."""
        self.counters.reads += sum(1 for _ in neighbours(records))
        self.counters.records_read += len(records)
        self.counters.bytes_read += len(records) * self.spec.record_bytes
        # The index has the checksum too: an older record at the same place is whole, and still the wrong one.
        return [
            whole
            and checksum_of(row) == self._checks.get(record)
            and (self.cipher is None or decrypt(row, self.spec.warm_bytes, self.cipher))
            for whole, row, record in zip(good, out, records, strict=False)
        ]

    def free(self, record: int) -> None:
        """Forget a record; its place is used again once no commit refers to it."""
        if record in self._committed:
            self._released.add(record)
        else:
            self._free.append(record)

    # -- commits -----------------------------------------------------------------------------------------------

    def tier(self, record: int) -> int:
        """Return COLD: everything here is on flash."""
        return Tier.COLD

    def sync(self) -> None:
        """Make every record that was written so far survive a power loss.

        Raises:
            StoreError: the medium refused; nothing may be committed.
        """
        if not (self._dirty or self._failed):
            return
        try:
            # After one failure the system may call lost pages clean: nothing more is committed through these files.
            if self._failed:
                raise OSError(errno.EIO, "an earlier write was lost")
            for segment in self._segments.values():
                if segment.writable:
                    self.medium.sync(segment.file)
        except OSError as error:
            self._failed = True
            raise StoreError(f"cannot write the session {self.folder}: {error.strerror}") from error
        self._dirty = False

    def committed(self, records: Iterable[int]) -> None:
        """A commit is on the medium that refers to exactly these records; what it left out may be overwritten."""
        self._committed = set(records)
        self._free += sorted(self._released - self._committed)
        self._released &= self._committed

    def trim(self) -> None:
        """Give the space behind the last record back to the file system; only right after a commit."""
        for number, segment in self._segments.items():
            if segment.writable and self._spill is None and os.fstat(segment.file).st_nlink == 1:
                last = max((record & 0xFFFFFFFF for record in self._committed if record >> 32 == number), default=-1)
                os.ftruncate(segment.file, (last + 1) * self.spec.record_bytes)
                segment.n_records = last + 1
                self._free = [r for r in self._free if r >> 32 != number or r & 0xFFFFFFFF <= last]

    def retire(self) -> None:
        """Write all new records to a new segment from now on."""
        for segment in self._segments.values():
            segment.writable = False

    def forget(self, paths: dict[int, Path]) -> None:
        """Remove segments that no commit refers to any more."""
        for number, path in paths.items():
            os.close(self._segments.pop(number).file)
            path.unlink()
        sync_folder(self.folder)

    def close(self) -> None:
        """Close the files."""
        for segment in self._segments.values():
            os.close(segment.file)
        self._segments = {}
        if self._wear is not None:
            self._wear.close()
            self._wear = None

    def _allocate(self, count: int) -> list[int]:
        for number, segment in self._segments.items():
            # A session was forked from this one meanwhile: the segment belongs to both now.
            if segment.writable and self._spill is None and os.fstat(segment.file).st_nlink > 1:
                segment.writable = False
                self._free = [record for record in self._free if record >> 32 != number]
        # Old holes only when they suffice: a batch at the end of the file is one sequential write.
        free = [record for record in self._free if self._segments[record >> 32].writable]
        if len(free) >= count:
            taken = sorted(free)[:count]
            gone = set(taken)
            self._free = [record for record in free if record not in gone]
            return taken
        number = (
            max((n for n, segment in self._segments.items() if segment.writable), default=0) or self._open_segment()
        )
        segment = self._segments[number]
        first = (number << 32) + segment.n_records
        segment.n_records += count
        return list(range(first, first + count))

    def _open_segment(self) -> int:
        number = max(self._segments, default=0) + 1
        folder = self._spill or self.folder
        path = folder / f"pages-{number:08d}.bin"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            if self._spill is not None:
                os.unlink(path)
            else:
                sync_folder(folder)
        except OSError as error:
            raise StoreError(f"cannot write the session {folder}: {error.strerror}") from error
        self._segments[number] = _Segment(file, 0, True)
        return number

    def _pwrite(self, view: memoryview, record: int) -> None:
        file, offset = self._segments[record >> 32].file, (record & 0xFFFFFFFF) * self.spec.record_bytes
        while view:
            written = self.medium.write(file, view, offset)
            offset += written
            view = view[written:]


def sync_folder(folder: Path) -> None:
    """Make new and renamed files of a folder survive a power loss, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # Windows has no handle of a folder
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
