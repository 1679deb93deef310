"""What a cache and a run did, as plain numbers."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.runtime.store import StoreCounters
from edgekv.runtime.table import offloaded
from edgekv.types import Tier


@dataclass
class CacheStats:
    """Counters of page movements since the cache was made."""

    pages_compressed: int = 0
    pages_offloaded: int = 0
    pages_fetched: int = 0
    pages_dropped: int = 0
    pages_held_back: int = 0  #: times that a page stayed in RAM because the day's writes to flash were used up
    pages_missed: int = 0  #: times that a step wanted a page which had been dropped
    tokens_pruned: int = 0
    pages_merged: int = 0  #: freed since their few tokens moved into another page


@dataclass(frozen=True)
class Spread:
    """The distribution of a number over the steps of a run."""

    mean: float
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarise one value or more."""
        return cls(float(np.mean(values)), *(float(x) for x in np.percentile(values, [50, 99, 100])))


@dataclass(frozen=True)
class SelectionStats:
    """What selective attention did, over the steps that left pages out. Pages are counted over all layers.

    ``missing_mean``, ``missing_max``: certified bounds on the softmax mass that a step missed, the mean over its layers and
    heads and the largest of them; ``fetched`` pages came from flash, ``hit`` ones were in RAM.
    """

    steps: int
    pages_per_step: float
    wanted_per_step: float
    hit_per_step: float
    fetched_per_step: float
    hit_rate: float
    missing_mean: Spread
    missing_max: Spread


class SelectionLog:
    """Collects :class:`SelectionStats`, layer by layer."""

    def __init__(self) -> None:
        self._step = -1
        self._pages: list[int] = [0, 0, 0, 0]
        self._bounds: list[list[float]] = []

    def count(
        self, step: int, tiers: NDArray[np.uint8], taken: NDArray[np.bool_], missing: NDArray[np.float64]
    ) -> None:
        """Add one layer: the tiers of its pages before the step, those taken, and the bound per head."""
        if step != self._step:
            self._step = step
            self._bounds.append([])
        self._bounds[-1].extend(missing.tolist())
        counted = (tiers < Tier.FREE, taken, taken & (tiers <= Tier.WARM), taken & offloaded(tiers))
        self._pages = [total + int(np.count_nonzero(mask)) for total, mask in zip(self._pages, counted, strict=True)]

    def summary(self) -> SelectionStats | None:
        """Return the distribution so far; None if no step left a page out."""
        steps = len(self._bounds)
        if not steps:
            return None
        pages, wanted, hit, fetched = self._pages
        return SelectionStats(
            steps,
            pages / steps,
            wanted / steps,
            hit / steps,
            fetched / steps,
            hit / wanted if wanted else 1.0,
            Spread.of([float(np.mean(bounds)) for bounds in self._bounds]),
            Spread.of([max(bounds) for bounds in self._bounds]),
        )


@dataclass(frozen=True)
class CacheUse:
    """How much a cache holds now. ``bytes_by_tier`` counts payload; ``arena_bytes`` what the frames in use take."""

    tokens: int
    budget_bytes: int
    arena_bytes: int
    pages_by_tier: dict[str, int] = field(default_factory=dict)
    bytes_by_tier: dict[str, int] = field(default_factory=dict)


@dataclass
class PressureStats:
    """Changes of the budget while a run went on. ``asked_bytes`` of pages had to leave RAM, ``freed_bytes`` did."""

    changes: int = 0
    failed: int = 0
    asked_bytes: int = 0
    freed_bytes: int = 0
    seconds: float = 0.0
    longest_s: float = 0.0
    budget_bytes: int = 0  #: in force after the last change

    def count(self, asked_bytes: int, freed_bytes: int, seconds: float, budget_bytes: int) -> None:
        """Add one change."""
        self.changes += 1
        self.asked_bytes += asked_bytes
        self.freed_bytes += freed_bytes
        self.seconds += seconds
        self.longest_s = max(self.longest_s, seconds)
        self.budget_bytes = budget_bytes


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
    remote_bytes_written: int = 0
    remote_bytes_read: int = 0
    cache: CacheUse | None = None
    pages: CacheStats | None = None
    selection: SelectionStats | None = None
    pressure: PressureStats | None = None

    def count(self, counters: StoreCounters) -> None:
        """Take over what the store of the run has counted."""
        self.bytes_written = counters.bytes_written
        self.bytes_read = counters.bytes_read
        self.remote_bytes_written = counters.remote_bytes_written
        self.remote_bytes_read = counters.remote_bytes_read

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
