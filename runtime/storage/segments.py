"""The page files of a session: a :class:`~edgekv.runtime.storage.interface.PageStore` whose records stay.

Records have the format of :mod:`edgekv.runtime.storage.record`, in segment files ``pages-00000001.bin`` and up; a record's number
is ``segment << 32 | place in the segment``. Invariants: a record that the last commit refers to is never overwritten; what
is read is compared with the checksum that the index holds, so that an old index never gets a newer record; a
segment that another session shares (by a hard link) is only read, new records go to a new one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import CorruptPage, StoreError
from edgekv.spec import PageSpec
from edgekv.tiers import Tier

from ..kernels.interface import Pool, RecordStreams
from .cipher import Cipher
from .interface import Landing, StoreCounters
from .medium import Arrival, Medium, SystemMedium
from .page_file import FileKind, PageFile
from .record import Wanted, checksum_of, neighbours
from .wear import WearLedger

Bytes = NDArray[np.uint8]
_SEGMENT = re.compile(r"pages-(\d{8})\.bin")
_WHEN_FULL = (
    "free some space, remove old sessions (edgekv sessions list, rm) or compact this one (edgekv sessions compact)"
)
_PLACE = 0xFFFFFFFF  # of a record in its segment


def segment_paths(folder: Path) -> dict[int, Path]:
    """Return the segment files of a session folder by their number."""
    found = ((_SEGMENT.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in sorted(found, key=lambda pair: pair[1].name) if match}


def count_records(folder: Path, spec: PageSpec) -> dict[int, int]:
    """Return how many whole records the segment files of a session have, by their number."""
    return {number: path.stat().st_size // spec.record_bytes for number, path in segment_paths(folder).items()}


def is_counted(record: int, counts: dict[int, int]) -> bool:
    """Tell whether a record is among those that :func:`count_records` counted."""
    return record & _PLACE < counts.get(record >> 32, 0)


class SegmentStore:
    """The records of one session folder.

    Args:
        medium: where its files are; this machine's by default. wear: counts what is written, and may refuse it. The store closes
            both.
        write: False for a session that is only read.
        name, when_full: what it is called in errors, and the way out of a full medium.

    Raises (from the constructor):
        StoreError: a file cannot be opened.
    """

    def __init__(
        self,
        folder: Path,
        spec: PageSpec,
        cipher: Cipher | None = None,
        medium: Medium | None = None,
        wear: WearLedger | None = None,
        *,
        write: bool = True,
        name: str | None = None,
        when_full: str = _WHEN_FULL,
    ) -> None:
        self.folder = folder
        self._medium = medium = medium or SystemMedium()
        self.spec = spec
        self.counters = StoreCounters()
        self.freed = 0
        self.cipher = cipher
        self._write = write
        self.wear = wear
        self._kind = FileKind(
            spec,
            name or f"the session {folder}",
            when_full,
            medium,
            cipher,
            wear,
        )
        self._segments: dict[int, PageFile] = {}
        self._writable: set[int] = set()
        self._checks: dict[int, int] = {}
        self._committed: set[int] = set()
        self._released: set[int] = set()
        self._dirty: set[int] = set()
        self._failed = False
        #: No new segment has the number of one that is gone, while the index still refers to it.
        self._last_number = 0
        try:
            self.open_segments()
        except StoreError:
            self.close()
            raise

    def open_segments(self) -> None:
        """Open the segments of the folder that are not open yet.

        Raises:
            StoreError: a file cannot be opened.
        """
        try:
            paths = segment_paths(self.folder)
        except OSError as error:
            raise StoreError(f"cannot open the session {self.folder}: {error.strerror}") from error
        for number, path in paths.items():
            if number in self._segments:
                continue
            try:
                segment = self._open_segment(path, number)
            except OSError as error:
                raise StoreError(
                    f"cannot open the pages of the session {self.folder}: {path.name}: {error.strerror}; a file that is moved"
                    " away counts as damaged: what is before it is reused, the rest computed again"
                ) from error
            self._segments[number] = segment
            self._last_number = max(self._last_number, number)

    def _open_segment(self, path: Path, number: int) -> PageFile:
        if self._write:
            with contextlib.suppress(PermissionError):  # then it is only read, and new records go to another
                segment = PageFile.open(path, self._kind, number << 32)
                if not segment.shared:
                    self._writable.add(number)
                return segment
        return PageFile.open(path, self._kind, number << 32, write=False)

    # -- records -----------------------------------------------------------------------------------------------

    def adopt(self, records: Iterable[int], checks: Iterable[int]) -> None:
        """Take over records that the index refers to; all others are free.

        A segment that lacks one of them takes no new ones: under the number of a lost record there is never another.
        """
        self._checks = dict(zip(records, checks, strict=True))
        self._committed = set(self._checks)
        self._last_number = max((self._last_number, *(record >> 32 for record in self._committed)))
        held = {number: segment.n_whole for number, segment in self._segments.items()}
        self._writable -= {record >> 32 for record in self._committed if not is_counted(record, held)}
        self._keep_committed()

    def check_of(self, record: int) -> int:
        """Return the checksum of a record that was adopted or written."""
        return self._checks[record]

    def write(self, tags: list[int], pages: list[Bytes]) -> list[int]:
        """Write pages [<= warm_bytes] uint8 as records and return their numbers; see :meth:`PageFile.write`.

        Raises:
            StoreFull, StoreError: none of the pages counts as stored, and the caller still has them.
        """
        number = self._segment_for_writing()
        records, checks = self._segments[number].write(tags, pages)
        self._checks.update(zip(records, checks, strict=True))
        self._dirty.add(number)
        self.counters.records_written += len(records)
        self.counters.bytes_written += len(records) * self.spec.record_bytes
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
                    f"record {records[index] & _PLACE} of {self._kind.name} (layer {tags[index] >> 32 & 0xFFFF}, page"
                    f" {tags[index] & 0x3FFFFFFF}) differs from its checksum; it was not used. Run again: what is before"
                    " it will be reused, the rest computed. If this comes back, the medium is failing"
                )

    def try_read(self, records: list[int], tags: list[int], out: Bytes) -> list[bool]:
        """Read records and return for each row whether it may be used.

        Raises:
            StoreError: the medium refused (an input/output error counts as a bad record instead).
        """
        good = [False] * len(records)
        for start, stop in neighbours(records):
            segment = self._segments.get(records[start] >> 32)
            if segment is not None:
                try:
                    good[start:stop] = segment.read(records[start:stop], tags[start:stop], out[start:stop])
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise self._unreadable(error) from error
        return self._usable(records, good, out)

    def start(self, wanted: Wanted, out: Bytes) -> Landing:
        """Start to read ``wanted`` into ``out``, and return what waits for it; see :class:`PageStore`."""
        parts = wanted.split(lambda record: record >> 32)
        arrivals = [self._arrival(number, part, out[rows]) for number, part, rows in parts]

        def land(pool: Pool | None) -> None:
            good: list[bool] = []
            failed: OSError | None = None
            for arrive in arrivals:  # all of them, also when one fails
                try:
                    good += arrive(pool)
                except OSError as error:
                    failed = error
            if failed is not None:
                raise self._unreadable(failed) from failed
            self._refuse_bad(wanted.records, wanted.tags, self._usable(wanted.records, good, out))

        return land

    def _arrival(self, number: int, wanted: Wanted, out: Bytes) -> Arrival:
        if number not in self._segments:
            return lambda pool: [False] * len(wanted.records)
        return self._segments[number].start(wanted, out)

    def walk(self, rows: Bytes, capacity: int, n_layers: int) -> RecordStreams | None:
        """None: the index has checksums that the kernels do not know."""
        return None

    def _unreadable(self, error: OSError) -> StoreError:
        return StoreError(f"cannot read {self._kind.name}: {error.strerror}")

    def _usable(self, records: list[int], good: list[bool], out: Bytes) -> list[bool]:
        """Count what was read, and return which of the good rows are what the index says."""
        self.counters.reads += sum(1 for _ in neighbours(records))
        self.counters.records_read += len(records)
        self.counters.bytes_read += len(records) * self.spec.record_bytes
        # The index has the checksum too: an older record at the same place is whole, and still the wrong one.
        return [
            whole and checksum_of(row) == self._checks.get(record)
            for whole, row, record in zip(good, out, records, strict=False)
        ]

    def free(self, record: int) -> None:
        """Forget a record; its place is used again once no commit refers to it."""
        if record in self._committed:
            self._released.add(record)
        else:
            self._give_back([record])

    def tier(self, record: int) -> int:
        """Return COLD: everything here is on flash."""
        return Tier.COLD

    # -- commits -----------------------------------------------------------------------------------------------

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
            for number in self._dirty:
                self._segments[number].sync()
        except OSError as error:
            self._failed = True
            raise StoreError(f"cannot write to {self._kind.name}: {error.strerror}") from error
        self._dirty.clear()

    def committed(self, records: Iterable[int]) -> None:
        """A commit is on the medium that refers to exactly these records; what it left out may be overwritten."""
        now = set(records)
        self.changed(now, self._committed - now)

    def changed(self, more: Iterable[int], less: Iterable[int]) -> None:
        """A commit is on the medium that refers to these records besides, and no longer to those."""
        less = set(less)
        self._committed.update(more)
        self._committed -= less
        self._give_back(sorted(self._released & less))
        self._released -= less

    def trim(self) -> None:
        """Give the space behind the last record back to the file system; only right after a commit."""
        self._retire_shared()
        self._keep_committed()
        for number in self._writable:
            self._segments[number].trim()

    def retire(self) -> None:
        """Write all new records to a new segment from now on."""
        self._writable.clear()

    def forget(self, paths: dict[int, Path]) -> None:
        """Remove segments that no commit refers to any more."""
        for number, path in paths.items():
            self._segments.pop(number).close()
            path.unlink()
        sync_folder(self.folder)

    def close(self) -> None:
        """Close the files."""
        self._medium.close()
        for segment in self._segments.values():
            segment.close()
        self._segments = {}
        if self.wear is not None:
            self.wear.close()
            self.wear = None

    def _keep_committed(self) -> None:
        self.freed += 1
        for number in self._writable:
            self._segments[number].keep({record for record in self._committed if record >> 32 == number})

    def _give_back(self, records: Iterable[int]) -> None:
        for record in records:
            if record >> 32 in self._writable:
                self._segments[record >> 32].free([record])
                self.freed += 1

    def _retire_shared(self) -> None:
        """Leave alone from now on what another session shares since it was forked from this one: it belongs to both."""
        self._writable = {number for number in self._writable if not self._segments[number].shared}

    def _segment_for_writing(self) -> int:
        self._retire_shared()
        return max(self._writable, default=0) or self._begin_segment()

    def _begin_segment(self) -> int:
        number = self._last_number + 1
        if not self._write:
            raise StoreError(f"{self._kind.name} is only read")
        try:
            segment = PageFile.create(self.folder / f"pages-{number:08d}.bin", self._kind, number << 32)
            sync_folder(self.folder)
        except OSError as error:
            raise StoreError(f"cannot write to {self._kind.name}: {error.strerror}") from error
        self._segments[number] = segment
        self._last_number = number
        self._writable.add(number)
        return number


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
