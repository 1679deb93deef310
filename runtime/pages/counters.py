"""What a cache did and holds, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


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
class CacheUse:
    """How much a cache holds now. ``bytes_by_tier`` counts payload; ``arena_bytes`` what the frames in use take.

    ``pinned_pages``: of all layers, those of a pinned span; the first page and the recent ones are pinned besides.
    """

    tokens: int
    budget_bytes: int
    arena_bytes: int
    pinned_pages: int = 0
    pages_by_tier: dict[str, int] = field(default_factory=dict)
    bytes_by_tier: dict[str, int] = field(default_factory=dict)
