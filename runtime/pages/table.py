"""The page table: per layer, the pages in logical order, and which token each slot holds.

Columns are flat arrays [n_layers, max_pages], one entry per page, so that the table can be printed, and so that a
kernel can read the row of a layer as it is (``refs``). The table changes no residency: only the cache does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import TokenDropped, TokenNotFound, TokenPruned
from edgekv.spec import PageSpec
from edgekv.tiers import Tier

from ..kernels.interface import PAGE_REF

Int = NDArray[np.int64]
#: In ``tokens``: the slot is empty or its token was pruned. In ``record``: not on flash.
NOTHING = -1
#: In ``content``: the page may still change.
UNSETTLED = 0


def offloaded(tiers: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return where a page is outside RAM and can be read back: on flash or in the object store."""
    away: NDArray[np.bool_] = (tiers == Tier.COLD) | (tiers == Tier.REMOTE)
    return away


class PageTable:
    """Where every page and every token is.

    A slot's index is the order of arrival within its layer: slot ``s`` is in page ``s // page_size``. A page is
    sealed once all its slots were written; the tail page is open until then.

    Args:
        windows: per layer, how many tokens a token sees, itself included; 0: all of them. Without any: 0 in every layer.
    """

    def __init__(self, spec: PageSpec, max_pages: int, windows: tuple[int, ...] = ()) -> None:
        self.spec = spec
        self.windows = np.array(windows or (0,) * spec.n_layers, np.int64)
        self.has_windows = bool(self.windows.any())
        #: Pages before this one were freed, since no token to come sees them, and how many tokens they held.
        self.passed = np.zeros(spec.n_layers, np.int64)
        self.passed_tokens = np.zeros(spec.n_layers, np.int64)
        layers = spec.n_layers
        self.refs = np.zeros((layers, max_pages), PAGE_REF)
        self.tier = np.full((layers, max_pages), Tier.FREE, np.uint8)
        self.offset = np.zeros((layers, max_pages), np.int64)
        self.record = np.full((layers, max_pages), NOTHING, np.int64)
        self.last_used = np.zeros((layers, max_pages), np.int64)
        #: A number that no other content of a page has had: who copied a page knows by it whether the copy is still true.
        self.content = np.full((layers, max_pages), UNSETTLED, np.int64)
        self.mass = np.zeros((layers, max_pages), np.float32)
        self.marked = np.zeros((layers, max_pages), bool)
        self.tokens = np.full((layers, max_pages * spec.page_size), NOTHING, np.int64)
        #: Slot in which a token arrived, where a merge has moved it; NOTHING elsewhere.
        self.arrived = np.full((layers, max_pages * spec.page_size), NOTHING, np.int64)
        self.n_slots = np.zeros(layers, np.int64)
        self._contents = UNSETTLED
        self.pruned: list[set[int]] = [set() for _ in range(layers)]

    @property
    def max_pages(self) -> int:
        """Pages that the columns can describe before they grow."""
        return self.refs.shape[1]

    def grow(self, max_pages: int) -> None:
        """Make room for ``max_pages`` pages per layer, at least doubling; does nothing when there is room."""
        extra = max(max_pages, 2 * self.max_pages) - self.max_pages
        if max_pages <= self.max_pages:
            return
        # Not np.concatenate: it packs structured rows, and the kernels count on their padding.
        for name, fill in (("refs", 0), ("tier", Tier.FREE), ("offset", 0), ("record", NOTHING), ("last_used", 0),
                           ("content", UNSETTLED), ("mass", 0), ("marked", False)):  # fmt: skip
            setattr(self, name, _widened(getattr(self, name), extra, fill))
        self.tokens = _widened(self.tokens, extra * self.spec.page_size, NOTHING)
        self.arrived = _widened(self.arrived, extra * self.spec.page_size, NOTHING)

    def n_pages(self, layer: int) -> int:
        """Pages of a layer, the open one included."""
        return -(-int(self.n_slots[layer]) // self.spec.page_size)

    def first_seen(self) -> Int:
        """Return per layer the first page that the next token sees, and no token to come sees an earlier one."""
        behind = np.where(self.windows > 0, self.n_slots - self.windows + 1, 0)
        first: Int = np.maximum(behind, 0) // self.spec.page_size
        return first

    def seen(self) -> NDArray[np.bool_]:
        """Return [n_layers, max_pages] False where no token to come sees a page."""
        return np.arange(self.max_pages)[None, :] >= self.first_seen()[:, None]

    def sealed(self) -> NDArray[np.bool_]:
        """Return [n_layers, max_pages] True where every slot of a page was written."""
        full = self.n_slots // self.spec.page_size
        return np.arange(self.max_pages)[None, :] < full[:, None]

    def settle(self, layer: int, page: int) -> None:
        """Say that a page has a content of its own from now on, which stays until the page is written to again."""
        self._contents += 1
        self.content[layer, page] = self._contents

    def live_slots(self, layer: int, page: int) -> int:
        """Number of slots of a page that hold a token which was not pruned."""
        mask: int = int(self.refs["mask"][layer, page, 0]) | int(self.refs["mask"][layer, page, 1]) << 64
        return mask.bit_count()

    def set_live(self, layer: int, page: int, first: int, stop: int, *, live: bool) -> None:
        """Mark slots [first, stop) of a page as holding a token, or not."""
        bits = ((1 << stop) - 1) ^ ((1 << first) - 1)
        row = self.refs["mask"][layer, page]
        mask = int(row[0]) | int(row[1]) << 64
        mask = mask | bits if live else mask & ~bits
        row[0], row[1] = mask & 0xFFFFFFFFFFFFFFFF, mask >> 64

    def live(self, layer: int, page: int) -> Int:
        """Return the slots of a page, from 0, that hold a token which was not pruned."""
        first = page * self.spec.page_size
        return np.flatnonzero(self.tokens[layer, first : first + self.spec.page_size] != NOTHING)

    def move(self, layer: int, source: Int, target: Int) -> None:
        """Say that the tokens in some slots of a layer lie in others now, and remember where they arrived."""
        held, came = self.tokens[layer, source].copy(), self.arrived[layer, source].copy()
        self.tokens[layer, source] = self.arrived[layer, source] = NOTHING
        self.tokens[layer, target] = held
        self.arrived[layer, target] = np.where(came == NOTHING, source, came)
        size = self.spec.page_size
        for slots, live in ((source, False), (target, True)):
            for slot in slots.tolist():
                self.set_live(layer, slot // size, slot % size, slot % size + 1, live=live)

    def find(self, layer: int, tokens: Int) -> Int:
        """Return the slot of each token [n] int64.

        Raises:
            TokenPruned, TokenDropped, TokenNotFound: a token has no slot in this layer.
        """
        held = self.tokens[layer, : int(self.n_slots[layer])]
        in_range = (tokens >= 0) & (tokens < held.size)
        if in_range.all() and np.array_equal(held[tokens], tokens):
            return tokens  # positions in order of arrival: the usual case
        order = np.argsort(held, kind="stable")
        place = np.searchsorted(held, tokens, sorter=order)
        slots = order[np.minimum(place, held.size - 1)] if held.size else np.zeros_like(tokens)
        missing = (held[slots] != tokens) if held.size else np.ones(tokens.shape, bool)
        missing |= tokens < 0
        if missing.any():
            token = int(tokens[missing][0])
            if token in self.pruned[layer]:
                raise TokenPruned(f"token {token} was pruned from layer {layer}; its keys and values are gone")
            if 0 <= token < int(self.passed[layer]) * self.spec.page_size:
                raise TokenDropped(
                    f"token {token} lies behind the window of layer {layer}; its keys and values are gone"
                )
            raise TokenNotFound(
                f"token {token} is not in the cache of layer {layer}, which holds {self.count(layer)} tokens"
            )
        return slots

    def holds(self, layer: int, tokens: Int) -> NDArray[np.bool_]:
        """Return [n] bool: which of the tokens have a slot in this layer."""
        return np.isin(tokens, self.tokens[layer, : int(self.n_slots[layer])]) & (tokens >= 0)

    def count(self, layer: int) -> int:
        """Number of tokens in a layer that were not pruned (dropped ones included, and those behind its window)."""
        return int(np.count_nonzero(self.tokens[layer] != NOTHING) + self.passed_tokens[layer])


def _widened(column: NDArray[Any], extra: int, fill: int) -> NDArray[Any]:
    """Return a copy of [n_layers, n] with ``extra`` more columns."""
    layers, held = column.shape
    wide = np.zeros((layers, held + extra), column.dtype)
    if fill:
        wide[:] = fill
    wide[:, :held] = column
    return wide
