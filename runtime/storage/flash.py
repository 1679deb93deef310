"""The flash tier: one :class:`~edgekv.runtime.storage.page_file.PageFile` in a folder, for as long as a run needs it.

The file has no name as soon as it is open, so that nothing is left behind, not even after a kill; the folder's lock keeps a
second process out.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import CorruptPage, StoreError, StoreLocked
from edgekv.files import make_folder, open_file, reason
from edgekv.scratch import ScratchFolder
from edgekv.spec import PageSpec
from edgekv.tiers import Tier

from ..kernels.interface import Pool, RecordStreams
from .cipher import Cipher
from .interface import Landing, StoreCounters
from .medium import Medium, SystemMedium
from .page_file import FileKind, PageFile
from .record import Wanted, is_short, neighbours
from .wear import WearLedger

if sys.platform != "win32":
    import fcntl

Bytes = NDArray[np.uint8]


class FlashStore:
    """A :class:`PageStore` in one file of a folder.

    Args:
        medium: where its file is; this machine's by default. wear: counts what is written, and may refuse it. The store closes
            both.
        cipher: encrypts the pages. scratch: removed when the store is closed.

    Raises (from the constructor):
        StoreLocked: another process uses the folder.
        StoreError: the folder cannot be written.
    """

    #: What its file is made as.
    file_type: type[PageFile] = PageFile

    def __init__(
        self,
        folder: Path,
        spec: PageSpec,
        medium: Medium | None = None,
        wear: WearLedger | None = None,
        cipher: Cipher | None = None,
        scratch: ScratchFolder | None = None,
    ) -> None:
        self.folder = folder
        self.spec = spec
        self.counters = StoreCounters()
        self.freed = 0
        self.cipher = cipher
        self._medium = medium = medium or SystemMedium()
        self._wear = wear
        self._scratch = scratch
        self._lock = lock_folder(folder)
        kind = FileKind(
            spec,
            f"the offload folder {folder}",
            "free some space, choose another with --offload DIR, raise --kv-budget or lower --context",
            medium,
            cipher,
            wear,
        )
        try:
            self.file = self.file_type.create(
                folder / f"pages-{os.getpid()}-{secrets.token_hex(8)}.bin", kind, keep=False
            )
        except OSError as error:
            os.close(self._lock)
            raise unusable(folder, error) from error

    def write(self, tags: list[int], pages: list[Bytes]) -> list[int]:
        """Write pages, each [warm_bytes] uint8, as records; see :meth:`PageFile.write`.

        Raises:
            StoreFull, WriteLimit, StoreError: none of the pages counts as stored, and the caller still has them.
        """
        records, _ = self.file.write(tags, pages)
        self.counters.records_written += len(records)
        self.counters.bytes_written += len(records) * self.spec.record_bytes
        return records

    def read(self, records: list[int], tags: list[int], out: Bytes) -> None:
        """Read records into ``out`` [n, record_bytes] uint8; see :meth:`PageFile.read`.

        The payload of row ``i`` is ``out[i, RECORD_HEADER_BYTES:][: spec.warm_bytes]``. Safe to call from another thread
        than ``write``.

        Raises:
            CorruptPage: a record is not what was written; ``out`` must not be used.
            StoreError: the read failed.
        """
        try:
            good = self.file.read(records, tags, out)
        except OSError as error:
            raise self.unreadable(error) from error
        self.count(records, tags, good)

    def start(self, wanted: Wanted, out: Bytes) -> Landing:
        """Start to read ``wanted`` into ``out``, and return what waits for it; see :class:`PageStore`."""
        arrive = self.file.start(wanted, out)

        def land(pool: Pool | None) -> None:
            try:
                good = arrive(pool)
            except OSError as error:
                raise self.unreadable(error) from error
            self.count(wanted.records, wanted.tags, good)

        return land

    def walk(self, rows: Bytes, capacity: int, n_layers: int) -> RecordStreams | None:
        """The native page walk, or None without native kernels; the kernels do not decrypt."""
        plain = self.cipher is None and not is_short(self.spec.warm_bytes)
        return self._medium.walk(rows, capacity, n_layers) if plain else None

    def unreadable(self, error: OSError) -> StoreError:
        """Return what a read that the system refused means to a user."""
        return StoreError(f"cannot read from the offload folder {self.folder}: {error.strerror}")

    def count(self, records: list[int], tags: list[int], good: list[bool]) -> None:
        """Count what was read, if all of it is good.

        Raises:
            CorruptPage: it is not; the message names the first record that is bad.
        """
        if not all(good):
            index = good.index(False)
            if not self.file.holds(records[index]):
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
        self.file.free([record])
        self.freed += 1

    def tier(self, record: int) -> int:
        """Return COLD: everything here is on flash."""
        return Tier.COLD

    def close(self) -> None:
        """Close the file, the lock and the ledger; the space goes back to the file system."""
        self._medium.close()
        self.file.close()
        os.close(self._lock)
        if self._wear is not None:
            self._wear.close()
        if self._scratch is not None:
            self._scratch.remove()


def lock_folder(folder: Path) -> int:
    """Make an offload folder if it is not there, and keep other processes out; returns the handle of its lock.

    Raises:
        StoreLocked: another process uses it. StoreError: it cannot be used.
    """
    try:
        make_folder(folder)
    except OSError as error:
        raise unusable(folder, error) from error
    try:
        lock = open_file(folder / "lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise unusable(folder / "lock", error) from error
    if sys.platform != "win32":
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise StoreLocked(
                f"another process uses the offload folder {folder}; give each process its own with --offload DIR"
            ) from error
    return lock


def unusable(path: Path, error: OSError) -> StoreError:
    """Return what an offload folder, or a file in it, that cannot be written means to a user."""
    return StoreError(f"cannot write the offload folder {path}: {reason(error)}; choose another with --offload DIR")
