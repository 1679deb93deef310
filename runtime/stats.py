"""What a cache and a run did, as plain numbers."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class CacheStats:
    """Counters of page movements since the cache was made."""

    pages_compressed: int = 0
    pages_offloaded: int = 0
    pages_fetched: int = 0
    pages_dropped: int = 0
    pages_missed: int = 0  #: times that a step wanted a page which had been dropped
    tokens_pruned: int = 0


@dataclass(frozen=True)
class CacheUse:
    """How much a cache holds now. ``bytes_by_tier`` counts payload; ``arena_bytes`` what the frames in use take."""

    tokens: int
    budget_bytes: int
    arena_bytes: int
    pages_by_tier: dict[str, int] = field(default_factory=dict)
    bytes_by_tier: dict[str, int] = field(default_factory=dict)


@dataclass
class RunStats:
    """What a run did. Times in seconds; ``decode_tokens`` counts tokens after the first."""

    load_seconds: float = 0.0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    reused_tokens: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    peak_rss_bytes: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    cache: CacheUse | None = None
    pages: CacheStats | None = None

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens computed per second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens per second, without the first."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


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
