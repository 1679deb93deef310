"""Memory that this process owns: anonymous mappings, in huge pages where they help."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


#: Below this an arena gains nothing from huge pages, and would round its RAM up.
LEAST_HUGE_BYTES = 8 * 1024 * 1024


def anonymous(size_bytes: int, *, huge: bool) -> mmap.mmap:
    """Return zeroed memory of this process alone, in ``huge`` pages where the system grants them.

    Linux backs shared mappings, Python's default, with huge pages only where an administrator allows it, and keeps their
    contents when they are given back.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size_bytes)
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


#: A huge page of x86-64, and of AArch64 with 4 KiB pages.
HUGE_PAGE_BYTES = 2 * 1024 * 1024


def aligned_rows(count: int, row_bytes: int) -> Bytes:
    """Return zeroed memory [count, row_bytes] uint8 that starts at a page boundary, as O_DIRECT asks for.

    From 2 MiB on it lies in huge pages, if the system has some: a read into 4 KiB pages, which lie anywhere, is one piece for
    each of them to a drive, and takes up to twice as long.
    """
    size = count * row_bytes
    huge = size >= HUGE_PAGE_BYTES
    whole = np.frombuffer(anonymous(size + HUGE_PAGE_BYTES if huge else max(size, 1), huge=huge), np.uint8)
    first = -whole.ctypes.data % HUGE_PAGE_BYTES if huge else 0
    return whole[first : first + size].reshape(count, row_bytes)
