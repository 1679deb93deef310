"""From the records of a session to the pages of a cache, and the open page back to records."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgekv.spec import RECORD_HEADER_BYTES
from edgekv.tiers import Tier

from ..pages.cache import KVCache
from ..pages.manager import tag
from ..pages.table import NOTHING
from ..storage.record import OPEN_KEYS, OPEN_VALUES
from ..storage.segments import SegmentStore
from ..system.buffers import aligned_rows
from .index import Row
from .steps import Steps

Bytes = NDArray[np.uint8]
_BATCH_BYTES = 4 * 1024 * 1024


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    for count, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return count
    return min(len(first), len(second))


@dataclass(frozen=True)
class Restored:
    """What a cache holds of a prompt, and how to go on.

    Attributes:
        count: tokens in the cache.
        steps: of these and of those that are computed again, so that they get the same bits as before.
        gone: [n] int64, positions behind ``count`` that were pruned: so they are again, once they are computed.
    """

    count: int
    steps: Steps
    gone: NDArray[np.int64]


class Restorable(Protocol):
    """What pages can be restored from."""

    def try_read(self, records: list[int], tags: list[int], out: Bytes) -> list[bool]:
        """Read records into ``out`` and return for each row whether it may be used."""
        ...


def restore_pages(cache: KVCache, rows: list[Row], store: Restorable) -> int:
    """Fill an empty cache with the pages of a session: in RAM as far as the budget allows, the rest COLD.

    Every record that a token to come may see is read once and checked; the first damaged one ends what is restored.

    Returns:
        how many pages (of all layers) the cache holds now.

    Raises:
        StoreError: the medium refused.
    """
    manager, spec = cache.manager, cache.spec
    cache.table.grow(len(rows) + 1)
    unseen = _unseen(cache, len(rows))
    batch = max(1, _BATCH_BYTES // (spec.record_bytes * spec.n_layers))
    buffers = [aligned_rows(batch * spec.n_layers, spec.record_bytes) for _ in range(2)]

    def read(first: int) -> tuple[list[tuple[int, int, int]], Bytes, list[bool]]:
        places = [
            (row.records[layer], layer, page)
            for page, row in enumerate(rows[first : first + batch], first)
            for layer in range(len(row.records))
            if page >= unseen[layer]
        ]
        places.sort()
        if not places:
            return places, buffers[0][:0], []
        out = buffers[first // batch % 2][: len(places)]
        return places, out, store.try_read([p[0] for p in places], [tag(*p[1:]) for p in places], out)

    starts = range(0, len(rows), batch)
    with ThreadPoolExecutor(1, thread_name_prefix="edgekv-restore") as reader:
        ahead = reader.submit(read, 0)
        for first in starts:
            places, out, good = ahead.result()
            if first != starts[-1]:
                ahead = reader.submit(read, first + batch)
            bad = min((p[2] for p, whole in zip(places, good, strict=True) if not whole), default=len(rows))
            cache.adopt(first, min(bad, first + batch, len(rows)))
            for page in range(first, min(bad, first + batch, len(rows))):
                for layer, record in enumerate(rows[page].records):
                    if page < unseen[layer]:
                        manager.adopt(layer, page, record)
            for (record, layer, page), row in zip(places, out, strict=True):
                if page < bad:
                    manager.adopt(layer, page, record)
                    manager.summarise(layer, page, row[RECORD_HEADER_BYTES:])
                    if manager.spare_room():
                        manager.bring(layer, [page], [row])
            if bad < len(rows):
                return bad
    return len(rows)


def check_unseen(cache: KVCache, rows: list[Row], n_pages: int, store: Restorable) -> int:
    """Check pages that :func:`restore_pages` did not read: a token that goes on earlier than behind ``n_pages`` may see them.

    Returns:
        how many of ``rows`` are whole, from the first on.

    Raises:
        StoreError: the medium refused.
    """
    unseen, spec = _unseen(cache, n_pages), cache.spec
    out = aligned_rows(spec.n_layers, spec.record_bytes)
    for page, row in enumerate(rows):
        places = sorted((record, layer) for layer, record in enumerate(row.records) if page < unseen[layer])
        tags = [tag(layer, page) for _, layer in places]
        if places and not all(store.try_read([record for record, _ in places], tags, out[: len(places)])):
            return page
    return len(rows)


def _unseen(cache: KVCache, n_pages: int) -> list[int]:
    """Return how many pages of each layer no token behind the first ``n_pages`` sees."""
    windows, size = cache.table.windows, cache.spec.page_size
    behind = np.where(windows > 0, n_pages * size - windows + 1, 0)
    unseen: list[int] = (np.maximum(behind, 0) // size).tolist()
    return unseen


def records_of(cache: KVCache, page: int) -> tuple[int, ...]:
    """Return the record of a page in each layer; none when every token of it was pruned."""
    return tuple(record for record in cache.table.record[:, page].tolist() if record != NOTHING)


def open_tags(n_layers: int, page: int, version: int) -> list[int]:
    """Return the tags of the records of an open page, [keys, values] per layer, in a session of format ``version``.

    In format 1 they were bits of the page's number.
    """
    kinds = (1 << 30, 1 << 31) if version == 1 else (OPEN_KEYS, OPEN_VALUES)
    return [tag(layer, page) | kind for layer in range(n_layers) for kind in kinds]


def store_open(cache: KVCache, n_slots: int, store: SegmentStore, version: int) -> list[int]:
    """Write the open page of every layer, fp16, as two records each; ``n_slots`` tokens of the sequence are in the cache.

    Args:
        version: the format of the session.

    Returns:
        the records, [keys, values] per layer; none when every token of the page was pruned.

    Raises:
        StoreFull, StoreError: nothing counts as written.
    """
    spec, page = cache.spec, n_slots // cache.spec.page_size
    half = spec.hot_bytes // 2
    payloads = []
    if (cache.table.tier[:, page] == Tier.FREE).all():
        return []
    for layer in range(spec.n_layers):
        assert cache.table.tier[layer, page] == Tier.HOT
        content = cache.manager.arena.page(int(cache.table.offset[layer, page]), spec.hot_bytes)
        payloads += [content[:half], content[half:]]
    return store.write(open_tags(spec.n_layers, page, version), payloads)


def restore_open(cache: KVCache, n_slots: int, records: tuple[int, ...], store: SegmentStore, version: int) -> bool:
    """Bring back the open page of every layer with its first tokens, up to ``n_slots`` in the sequence.

    Args:
        records: none when every token of the page was pruned; the caller prunes them again.
        version: the format of the session.

    Returns:
        False, with nothing changed, when a record is damaged.

    Raises:
        StoreError: the medium refused.
    """
    spec = cache.spec
    page, half = n_slots // spec.page_size, spec.hot_bytes // 2
    out = aligned_rows(len(records), spec.record_bytes)
    stored = spec.n_layers if records else 0
    if not all(store.try_read(list(records), open_tags(stored, page, version), out)):
        return False
    halves = out[:, RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + half]
    cache.adopt_open(n_slots, list(halves.reshape(stored, spec.hot_bytes)))
    return True
