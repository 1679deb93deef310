"""Where the bytes of page files go: the system calls of the stores, in one place."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .reads import Reads
from .record import Wanted


class Medium(Protocol):
    """Reads and writes open files at an offset, from any thread.

    Each raises OSError as the system does; the stores turn it into their own errors.
    """

    def read(self, file: int, out: memoryview, offset: int) -> int:
        """Read into ``out`` and return how many bytes came."""
        ...

    def start(
        self, reads: Reads, file: int, places: NDArray[np.int64], wanted: Wanted, out: NDArray[np.uint8]
    ) -> Callable[[], list[bool]]:
        """Start to read records ahead: see :meth:`Reads.rows`."""
        ...

    def write(self, file: int, data: memoryview, offset: int) -> int:
        """Write from ``data`` and return how many bytes went."""
        ...

    def sync(self, file: int) -> None:
        """Make what was written survive a power loss."""
        ...


class SystemMedium:
    """The file system of this machine."""

    def read(self, file: int, out: memoryview, offset: int) -> int:
        """Read as preadv does."""
        return os.preadv(file, [out], offset)

    def start(
        self, reads: Reads, file: int, places: NDArray[np.int64], wanted: Wanted, out: NDArray[np.uint8]
    ) -> Callable[[], list[bool]]:
        """Start to read records ahead."""
        return reads.rows(file, places, wanted, out)

    def write(self, file: int, data: memoryview, offset: int) -> int:
        """Write as pwrite does."""
        return os.pwrite(file, data, offset)

    def sync(self, file: int) -> None:
        """Write back as fsync does."""
        os.fsync(file)


SYSTEM = SystemMedium()
