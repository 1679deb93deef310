"""Who goes first when memory runs out. A policy names victims and moves nothing.

Under exact attention every page is read at every step, so plain recency says nothing. A page counts as *used*
when it received at least its fair share of attention mass, or when it was selected or read by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgekv.settings import POLICY

from .table import PageTable


@dataclass(frozen=True)
class PageUse:
    """What a policy may know of the candidates; all arrays are [n_candidates].

    ``page``: logical index within the layer (0 holds the first tokens). ``last_used``: step of last use.
    ``mass``: accumulated attention mass.
    """

    layer: NDArray[np.int64]
    page: NDArray[np.int64]
    last_used: NDArray[np.int64]
    mass: NDArray[np.float32]


class Policy(Protocol):
    """Order candidates from the first victim to the last."""

    @property
    def name(self) -> str:
        """The word that chooses it."""
        ...

    def order(self, use: PageUse) -> NDArray[np.int64]:
        """Return indices into the candidates, first victim first."""
        ...


@dataclass(frozen=True)
class LRU:
    """Least recently used first; ties go to one layer after the other: what leaves together is read back in one request."""

    name: str = "lru"

    def order(self, use: PageUse) -> NDArray[np.int64]:
        """Sort by last use, then layer, then page."""
        return np.lexsort((use.page, use.layer, use.last_used))


@dataclass(frozen=True)
class Heavy:
    """Least accumulated attention mass first (Source: H2O, arXiv 2306.14048, at page granularity)."""

    name: str = "heavy"

    def order(self, use: PageUse) -> NDArray[np.int64]:
        """Sort by mass, then page, then layer."""
        return np.lexsort((use.layer, use.page, use.mass))


@dataclass(frozen=True)
class Window:
    """Oldest tokens first: attention sinks and the recent window stay (Source: StreamingLLM, arXiv 2309.17453)."""

    name: str = "window"

    def order(self, use: PageUse) -> NDArray[np.int64]:
        """Sort by page (the first page, the sinks, last), then layer."""
        return np.lexsort((use.layer, np.where(use.page == 0, np.iinfo(np.int64).max, use.page)))


@dataclass(frozen=True)
class Random:
    """The baseline that a policy must beat. A hash of (seed, layer, page), so runs repeat."""

    seed: int = 0
    name: str = "random"

    def order(self, use: PageUse) -> NDArray[np.int64]:
        """Sort by a fixed pseudo-random number per page (Knuth's multiplicative hash)."""
        key = (use.layer.astype(np.uint64) << np.uint64(32)) + use.page.astype(np.uint64) + np.uint64(self.seed)
        return np.argsort(key * np.uint64(0x9E3779B97F4A7C15), kind="stable")


def make_policy(name: str) -> Policy:
    """Return the policy of that name.

    Raises:
        UsageError: there is none.
    """
    policies: dict[str, Policy] = {policy.name: policy for policy in (LRU(), Heavy(), Window(), Random())}
    return policies[POLICY.check(name)]


#: Pages behind a window that are kept: a sequence that is cut back by less need not be computed again.
SPARE_PAGES = 1
#: Sealed pages at the end of a layer that are pinned, and with the first page, all that are.
RECENT_PAGES = 2
PINNED_PAGES = 1 + RECENT_PAGES


@dataclass(frozen=True)
class CacheOptions:
    """How a cache reclaims.

    ``compress_at_seal``: quantise a page as soon as it is full. ``threshold``: share of the budget above which pages
    are reclaimed after each append. ``recent_pages`` and the first page are pinned: reclaim offloads
    them last and never drops them. ``windows``: per layer, how many tokens a token sees, 0 for all; pages that no token to come
    sees leave first, and with ``forget_unseen`` they are freed as soon as that is so. ``merge_layers``: where pages that are
    mostly pruned may be merged; None: everywhere. A layer with a sliding window is none of them: the kernel takes the slots of a
    page for consecutive positions.
    """

    budget_bytes: int
    compress_at_seal: bool = True
    compress: bool = True
    allow_drop: bool = False
    threshold: float = 1.0
    recent_pages: int = RECENT_PAGES
    windows: tuple[int, ...] = ()
    forget_unseen: bool = False
    merge_layers: frozenset[int] | None = frozenset()
    policy: Policy = field(default_factory=LRU)


def candidates(
    table: PageTable,
    options: CacheOptions,
    tier: int,
    *,
    unpinned: bool = False,
    among: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """Return sealed pages of a tier, rows (layer, page): those that no token to come sees, then unpinned ones, then the others.

    Each group is in the policy's order.
    """
    wanted = (table.tier == tier) & table.sealed()
    layers, pages = np.nonzero(wanted if among is None else wanted & among)
    tail = table.n_slots[layers] // table.spec.page_size
    pinned = table.marked[layers, pages] | (pages == 0) | (pages >= tail - options.recent_pages)
    seen = table.seen()[layers, pages] if table.has_windows else np.ones(len(pages), bool)
    pinned &= seen
    if unpinned:
        layers, pages, seen, pinned = layers[~pinned], pages[~pinned], seen[~pinned], pinned[~pinned]
    use = PageUse(layers, pages, table.last_used[layers, pages], table.mass[layers, pages])
    order = options.policy.order(use)
    order = order[np.argsort(seen[order].astype(np.int8) + pinned[order], kind="stable")]
    return np.stack([layers[order], pages[order]], axis=1)


def pairs(rows: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return rows (layer, page) [n, 2] one by one."""
    return [(layer, page) for layer, page in rows.tolist()]
