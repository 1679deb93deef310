"""What a store is: where offloaded pages go, and what it counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..kernels.interface import Pool, RecordStreams
from .record import Wanted

Bytes = NDArray[np.uint8]
#: Waits for what a store was started to read, which the threads of a pool check, and raises what ``read`` would.
Landing = Callable[[Pool | None], None]


@dataclass
class StoreCounters:
    """What a store has done so far; ``bytes_*`` count flash, ``remote_bytes_*`` an object store.

    ``reads``: requests to flash that ``records_read`` took.
    """

    records_written: int = 0
    records_read: int = 0
    reads: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    objects_written: int = 0
    remote_bytes_written: int = 0
    remote_bytes_read: int = 0
    records_reread: int = 0  #: read again, since they were damaged on the way

    def __add__(self, other: StoreCounters) -> StoreCounters:
        """Return what two stores have done together."""
        names = [field.name for field in dataclasses.fields(self)]
        return StoreCounters(*(getattr(self, name) + getattr(other, name) for name in names))


class PageStore(Protocol):
    """Where offloaded pages go."""

    @property
    def counters(self) -> StoreCounters:
        """What it has done so far."""
        ...

    @property
    def freed(self) -> int:
        """How often records became free to be overwritten; what was read ahead before may be another page's by now."""
        ...

    def write(self, tags: list[int], pages: list[Bytes]) -> list[int]:
        """Store pages, in one batch, and return their record indices."""
        ...

    def read(self, records: list[int], tags: list[int], out: Bytes) -> None:
        """Read records into out [n, record_bytes] uint8, checked; from any thread."""
        ...

    def start(self, wanted: Wanted, out: Bytes) -> Landing:
        """Start to read, and return what waits for the end and raises what ``read`` would."""
        ...

    def walk(self, rows: Bytes, capacity: int, n_layers: int) -> RecordStreams | None:
        """The native page walk, through slots of ``capacity`` rows; None where it cannot be had.

        Nor can it where a record, once read, is not a page, or where records are not in one file.
        """
        ...

    def free(self, record: int) -> None:
        """Let a record be overwritten."""
        ...

    def tier(self, record: int) -> int:
        """Return where a record is: COLD, on flash, or REMOTE, in an object store."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...


class Kept(Protocol):
    """Where the pages of a sequence are kept beyond its run, such as a session."""

    @property
    def store(self) -> PageStore:
        """The records."""
        ...

    @property
    def read_only(self) -> str | None:
        """Why nothing is written there, or None."""
        ...

    @property
    def encrypted(self) -> bool:
        """Whether what is kept is ciphertext."""
        ...
