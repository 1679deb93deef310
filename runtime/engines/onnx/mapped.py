"""Give back the pages of a mapped file that were only needed while a session was made.

ONNX Runtime maps external weights and repacks most of them into memory of its own; the pages that it read stay in the
process until something else needs the memory. They are clean copies of the file, so they can go at once, and come
back by themselves if they are touched again.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

_MADV_DONTNEED = 4  # Linux


def release_mapped_pages(path: Path) -> int:
    """Drop the resident pages of every mapping of ``path`` that this process never wrote to.

    Returns:
        how many bytes were dropped; 0 where this is not Linux.
    """
    if sys.platform != "linux":
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    released = 0
    for start, stop, resident in _clean_mappings(str(path.resolve())):
        if resident and madvise(start, stop - start, _MADV_DONTNEED) == 0:
            released += resident
    return released


def _clean_mappings(path: str) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, resident bytes) of the mappings of a file without a page of their own."""
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    mapping, resident = None, 0
    for line in lines:
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):
            first, _, last = words[0].partition("-")
            mapping = (int(first, 16), int(last, 16)) if len(words) == 6 and words[5] == path else None
        elif mapping is not None and words[0] == "Rss:":
            resident = int(words[1]) * 1024
        elif mapping is not None and words[0] == "Anonymous:" and words[1] == "0":
            yield (*mapping, resident)
