"""The drive under a folder, around the page cache: requests of 4 KiB, 64 KiB and 1 MiB, read and written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekv.errors import StoreError, UsageError
from edgekv.files import make_folder
from edgekv.runtime.storage.medium import QUEUE_DEPTH
from edgekv.runtime.system.buffers import aligned_rows
from edgekv.scratch import ScratchFolder

FILE_BYTES = 256 * 1024 * 1024
SIZES = (4096, 64 * 1024, 1024 * 1024)
#: How long each figure is measured for.
SECONDS = 0.7


@dataclass(frozen=True)
class Drive:
    """Seconds of one request by size; bytes/s with four requests in flight; requests/s of 4 KiB with sixteen."""

    read_s: dict[int, float]
    write_s: dict[int, float]
    read_bytes_per_s: float
    write_bytes_per_s: float
    requests_per_s: float
    direct: bool


def check_folder(folder: Path) -> None:
    """Make the folder, and a file in it for a moment: what :func:`measure_drive` begins with.

    Raises:
        UsageError: it cannot be done.
    """
    try:
        with _file(folder):
            pass
    except OSError as error:
        raise UsageError(f"cannot make a file in {folder}: {error.strerror}; choose another with --dir") from error


def measure_drive(folder: Path, advance: Callable[[], None] = lambda: None) -> Drive:
    """Measure with a file of 256 MiB in ``folder``, which is gone afterwards.

    Raises:
        StoreError: the folder cannot be written.
    """
    try:
        with _file(folder) as (handle, direct):
            return _measure(handle, direct, advance)
    except OSError as error:
        raise StoreError(
            f"cannot measure the drive under {folder}: {error.strerror}; choose another with --dir"
        ) from error


@contextmanager
def _file(folder: Path) -> Iterator[tuple[int, bool]]:
    make_folder(folder)
    with ScratchFolder(folder, "calibrate-") as scratch:
        handle, direct = _open(scratch.path / "drive")
        try:
            yield handle, direct
        finally:
            os.close(handle)


def _open(path: Path) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT), True
    except (OSError, AttributeError):  # tmpfs and some file systems refuse O_DIRECT; macOS has none
        return os.open(path, flags), False


def _measure(handle: int, direct: bool, advance: Callable[[], None]) -> Drive:
    largest = SIZES[-1]
    block = aligned_rows(1, largest)[0]
    block[:] = np.random.default_rng(0).integers(0, 256, largest, np.uint8)
    for offset in range(0, FILE_BYTES, largest):
        os.pwrite(handle, block.data, offset)
    os.fsync(handle)
    advance()

    def timed(size: int, depth: int, *, write: bool) -> float:
        """Return requests per second."""
        move = os.pwrite if write else _read
        buffers = aligned_rows(depth, size)  # side by side, as the staging ring is

        def worker(index: int) -> int:
            offsets = np.random.default_rng(index).permutation(FILE_BYTES // size) * size
            count, buffer = 0, buffers[index].data
            while not count or time.perf_counter() < end:  # at least one, however busy the machine
                move(handle, buffer, int(offsets[count % len(offsets)]))
                count += 1
            return count

        start = time.perf_counter()
        end = start + SECONDS
        with ThreadPoolExecutor(depth) as pool:
            count = sum(pool.map(worker, range(depth)))
        if write:
            os.fsync(handle)
        advance()
        return count / (time.perf_counter() - start)

    read = {size: 1 / timed(size, 1, write=False) for size in SIZES}
    read_rate = largest * timed(largest, QUEUE_DEPTH, write=False)
    requests = timed(SIZES[0], 16, write=False)
    written = {size: 1 / timed(size, 1, write=True) for size in SIZES}
    write_rate = largest * timed(largest, QUEUE_DEPTH, write=True)
    return Drive(read, written, read_rate, write_rate, requests, direct)


def _read(handle: int, buffer: memoryview, offset: int) -> int:
    return os.preadv(handle, [buffer], offset)


def latency(seconds: dict[int, float]) -> float:
    """Return the time of a request before its first byte: least squares of ``t0 + size / bandwidth`` over the sizes, relative."""
    sizes = np.array(list(seconds), float)
    times = np.array(list(seconds.values()))
    design = np.stack([1 / times, sizes / times], axis=1)
    t0, _ = np.linalg.lstsq(design, np.ones(len(times)), rcond=None)[0]
    return float(max(t0, 0.0))
