"""What a service is doing, as plain numbers: for a page that shows it, and for those who watch over it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from edgekv.spec import PageSpec
from edgekv.tiers import Tier

from ..pages.cache import KVCache

#: A page by its tier: hot, warm, cold, remote, dropped; a point where there is none.
LETTERS = {Tier.HOT: "H", Tier.WARM: "W", Tier.COLD: "C", Tier.REMOTE: "R", Tier.DROPPED: "D", Tier.FREE: "."}


@dataclass(frozen=True)
class SequenceFacts:
    """One of the sequences in RAM.

    Attributes:
        tokens: in its cache. reused_tokens: of its last prompt, that did not have to be computed.
        tiers: by layer, one letter for each of its pages, see :data:`LETTERS`.
    """

    state: Literal["idle", "reading", "writing"]
    tokens: int
    reused_tokens: int
    tiers: tuple[str, ...]


@dataclass(frozen=True)
class Snapshot:
    """What a service is doing at one moment, and has done since it began.

    Attributes:
        waiting: requests without a sequence. budget_bytes: of all sequences together.
        bytes_by_tier: of pages in RAM, and of those of running sequences on flash.
        cache_bytes, cache_limit_bytes, cache_entries: of what requests left on flash, and how many pages and turns these are.
        requests: that are over, by how they ended.
        prompt_tokens, reused_tokens: of the prompts that were read; generated_tokens: of answers.
    """

    waiting: int
    parallel: int
    context: int
    page_size: int
    budget_bytes: int
    peak_rss_bytes: int
    sequences: tuple[SequenceFacts, ...]
    pages_by_tier: dict[str, int]
    bytes_by_tier: dict[str, int]
    cache_bytes: int
    cache_limit_bytes: int
    cache_entries: int
    requests: dict[str, int]
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    flash_bytes_read: int
    flash_bytes_written: int


@dataclass
class Counts:
    """What a service has done since it began."""

    requests: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0


def sequence_facts(cache: KVCache | None, state: Literal["idle", "reading", "writing"], reused: int) -> SequenceFacts:
    """Return what there is to say of one sequence."""
    if cache is None:
        return SequenceFacts(state, 0, reused, ())
    table = cache.table
    n_pages = table.n_pages(0)
    tiers = tuple("".join(LETTERS[tier] for tier in row) for row in table.tier[:, :n_pages].tolist())
    return SequenceFacts(state, int(table.n_slots[0]), reused, tiers)


def by_tier(sequences: tuple[SequenceFacts, ...], spec: PageSpec) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many pages are in each tier, and their bytes."""
    letters = Counter(letter for facts in sequences for row in facts.tiers for letter in row)
    pages = {Tier.NAMES[tier]: letters[letter] for tier, letter in LETTERS.items() if tier != Tier.FREE}
    size = {"HOT": spec.hot_bytes, "DROPPED": 0}
    return pages, {name: count * size.get(name, spec.warm_bytes) for name, count in pages.items()}
