"""What this process may use: how much memory it has taken, how many cores it may use, where its files may go."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from edgekv.host import usable_cores, user_folder


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process so far, as the OS counted it (0 where it does not say)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    # macOS counts bytes here, the others KiB; Linux was answered above.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def default_threads() -> int:
    """Cores that this process may use, 4 at the most: decode is bound by memory, and little cores slow big ones."""
    return min(4, usable_cores())


def cache_home() -> Path:
    """Folder for files that may be deleted at any time."""
    return user_folder("XDG_CACHE_HOME", ".cache")


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """The call of glibc; None with another C library."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim


def return_free_memory() -> None:
    """Give back to the system what the allocator keeps for later, where it can be told to (glibc; some milliseconds).

    A generator frees blocks of many sizes from several threads. glibc keeps them: over a thousand generators in one process
    that came to tens of MiB.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
