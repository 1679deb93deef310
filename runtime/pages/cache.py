"""Keys and values of one sequence: tokens in, tokens out, whatever tier their pages are in.

The cache translates tokens to slots and pages; the page manager decides and changes where the pages are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekv.codec import unpack_hot, unpack_warm
from edgekv.errors import KeysOverflow, TokenDropped, TokenNotFound
from edgekv.spec import PageSpec
from edgekv.tiers import Tier

from ..kernels.interface import Kernels
from ..storage.interface import PageStore
from .arena import Arena
from .counters import CacheUse
from .invariants import check_pages
from .manager import PageManager
from .merge import merge_pages
from .policy import SPARE_PAGES, CacheOptions
from .table import NOTHING, UNSETTLED, Int, PageTable, offloaded

Bytes = NDArray[np.uint8]
Float = NDArray[np.float32]


@dataclass(frozen=True)
class TokenPlace:
    """Where one token goes in every layer: slot ``inside`` of page ``page``, which lies at ``addresses`` [n_layers]."""

    page: int
    inside: int
    addresses: list[int]


def overflow(layer: int, token: int, count: int = 1) -> KeysOverflow:
    """Return the error of tokens [token, token + count) with a key or value that fp16 cannot hold."""
    where = f"token {token}" if count == 1 else f"one of the tokens {token} to {token + count - 1}"
    return KeysOverflow(
        f"layer {layer} has a key or value beyond 65504 at {where}, and pages hold float16; is a projection of the model damaged,"
        " or scaled wrongly?"
    )


class KVCache:
    """Keys and values of one sequence, all layers, inside a budget.

    Raises (from the constructor):
        BudgetError: the budget cannot hold one open page per layer and one to work with.
    """

    def __init__(
        self,
        spec: PageSpec,
        options: CacheOptions,
        kernels: Kernels,
        store: PageStore | None = None,
        *,
        max_pages: int = 16,
        arena: type[Arena] = Arena,
    ) -> None:
        self.spec = spec
        self.table = PageTable(spec, max_pages, options.windows)
        self.manager = PageManager(spec, self.table, options, kernels, store, arena)

    def begin_step(self) -> None:
        """Begin a step of new tokens: pages that neither they nor any later token sees are freed, where that was asked for.

        Between two steps all layers hold the same tokens, so that a step that fails can still be taken back.
        """
        self.manager.step += 1
        table, size = self.table, self.spec.page_size
        if not (table.has_windows and self.manager.options.forget_unseen):
            return
        keep = table.first_seen() - SPARE_PAGES
        for layer in np.flatnonzero(keep > table.passed).tolist():
            for page in range(int(table.passed[layer]), int(keep[layer])):
                self.manager.free_page(layer, page)
            slots = slice(int(table.passed[layer]) * size, int(keep[layer]) * size)
            table.passed_tokens[layer] += np.count_nonzero(table.tokens[layer, slots] != NOTHING)
            table.tokens[layer, slots] = NOTHING
            table.passed[layer] = keep[layer]

    def append(self, layer: int, keys: Float, values: Float, tokens: Int) -> None:
        """Add new tokens to one layer; full pages are sealed.

        Args:
            keys, values: [T, n_kv_heads, head_dim] float32; stored as fp16.
            tokens: [T] int64, none of them in this layer yet.

        Raises:
            OutOfPages, StoreError: no room could be made. KeysOverflow: fp16 cannot hold one. The tokens were not added, all
                others keep their values.
        """
        table, page_size = self.table, self.spec.page_size
        start = int(table.n_slots[layer])
        stop = start + len(tokens)
        table.grow(-(-stop // page_size))
        slot = start
        try:
            while slot < stop:
                page, inside = divmod(slot, page_size)
                count = min(page_size - inside, stop - slot)
                if table.tier[layer, page] == Tier.FREE:
                    self.manager.make_room(1)
                    self.manager.open_page(layer, page)
                done = slice(slot - start, slot - start + count)
                view = self.manager.arena.page(int(table.offset[layer, page]), self.spec.hot_bytes)
                in_range = self.manager.kernels.write_hot(view, inside, keys[done], values[done], page_size)
                table.tokens[layer, slot : slot + count] = tokens[done]
                table.set_live(layer, page, inside, inside + count, live=True)
                table.refs["n_slots"][layer, page] = inside + count
                slot += count
                table.n_slots[layer] = slot
                if not in_range:
                    raise overflow(layer, int(tokens[done][0]), count)
                if inside + count == page_size:
                    self._fill(layer, page)
        except BaseException:
            self._withdraw(layer, start, slot)
            raise
        if table.pruned[layer]:
            table.pruned[layer].difference_update(tokens.tolist())
        if self.manager.options.threshold < 1.0:
            self.manager.reclaim_to_threshold()

    def can_begin_token(self) -> bool:
        """Say whether a token can be added to all layers at once, without a page that changes its tier on the way.

        All layers must hold the same number of slots, and their open pages be fp16 in RAM, or frames be free for new ones.
        """
        table, start = self.table, int(self.table.n_slots[0])
        if (table.n_slots != start).any():
            return False
        page, inside = divmod(start, self.spec.page_size)
        if inside:
            return not (table.tier[:, page] != Tier.HOT).any()
        missing = (
            int(np.count_nonzero(table.tier[:, page] == Tier.FREE)) if page < table.max_pages else self.spec.n_layers
        )
        return missing <= self.manager.arena.free_frames

    def begin_token(self) -> TokenPlace:
        """Open the page that a token goes to in every layer; :meth:`can_begin_token` said that there is room.

        :meth:`commit_token` counts the token in, or :meth:`cancel_token` gives back what was opened for it.
        """
        table = self.table
        page, inside = divmod(int(table.n_slots[0]), self.spec.page_size)
        table.grow(page + 1)
        if not inside:
            for layer in np.flatnonzero(table.tier[:, page] == Tier.FREE).tolist():
                self.manager.open_page(layer, page)
        return TokenPlace(page, inside, (table.offset[:, page] + self.manager.arena.address).tolist())

    def commit_token(self, place: TokenPlace, token: int, mass: Float) -> None:
        """Count a token in whose keys and values lie in their places, and record the mass [n_layers, n_pages] of its step."""
        table, manager, page_size = self.table, self.manager, self.spec.page_size
        self.touch_all(mass)
        table.tokens[:, place.page * page_size + place.inside] = token
        table.refs["mask"][:, place.page, place.inside // 64] |= np.uint64(1 << (place.inside % 64))
        table.refs["n_slots"][:, place.page] = place.inside + 1
        table.n_slots += 1
        for pruned in table.pruned:
            pruned.discard(token)
        if place.inside + 1 == page_size:
            for layer in range(self.spec.n_layers):
                self._fill(layer, place.page)
        if manager.options.threshold < 1.0:
            manager.reclaim_to_threshold()

    def _fill(self, layer: int, page: int) -> None:
        """Say that a page is full: it is sealed, and quantised at once if that was chosen."""
        if self.manager.options.compress_at_seal:
            self.manager.seal(layer, page)
        else:
            self.table.settle(layer, page)

    def cancel_token(self, place: TokenPlace) -> None:
        """Give back the pages that were opened for a token that never came."""
        if not place.inside:
            for layer in range(self.spec.n_layers):
                if self.table.live_slots(layer, place.page) == 0:
                    self.manager.free_page(layer, place.page)

    def adopt(self, first: int, last: int) -> None:
        """Say that the sealed pages [first, last), which come from a session, hold their tokens, in every layer."""
        table, size = self.table, self.spec.page_size
        table.tokens[:, first * size : last * size] = np.arange(first * size, last * size)
        table.refs["n_slots"][:, first:last] = size
        full = (1 << size) - 1
        table.refs["mask"][:, first:last] = np.array([full & 0xFFFFFFFFFFFFFFFF, full >> 64], np.uint64)
        table.n_slots[:] = last * size

    def adopt_open(self, n_slots: int, contents: list[Bytes]) -> None:
        """Take over the open page of a session: its first tokens, up to ``n_slots`` of the sequence, in every layer.

        Args:
            contents: [hot_bytes] uint8 of each layer's page; none when every token of it was pruned, and the caller prunes
                them again.

        Raises:
            OutOfPages, StoreError: no room could be made; nothing changed.
        """
        table, size = self.table, self.spec.page_size
        page, inside = divmod(n_slots, size)
        table.grow(page + 1)
        self.manager.make_room(len(contents))
        table.tokens[:, page * size : n_slots] = np.arange(page * size, n_slots)
        table.n_slots[:] = n_slots
        for layer, content in enumerate(contents):
            self.manager.open_page(layer, page)
            self.manager.arena.page(int(table.offset[layer, page]), self.spec.hot_bytes)[:] = content
            table.set_live(layer, page, 0, inside, live=True)
            table.refs["n_slots"][layer, page] = inside

    def _withdraw(self, layer: int, start: int, stop: int) -> None:
        """Take back the slots [start, stop) of an append that failed half way."""
        table, page_size = self.table, self.spec.page_size
        for page in range(start // page_size, -(-stop // page_size)):
            first = max(start - page * page_size, 0)
            table.set_live(layer, page, first, page_size, live=False)
            if table.live_slots(layer, page) == 0 and table.tier[layer, page] != Tier.FREE:
                self.manager.free_page(layer, page)
        table.tokens[layer, start:stop] = NOTHING
        page, inside = divmod(start, page_size)
        if inside and table.tier[layer, page] not in (Tier.HOT, Tier.FREE):
            # The page that these tokens completed was quantised to make room: it stays sealed, their slots stay empty.
            start = min(stop, (page + 1) * page_size)
        elif inside:
            table.refs["n_slots"][layer, page] = inside
            table.content[layer, page] = UNSETTLED
        table.n_slots[layer] = start

    def read(self, layer: int, tokens: Int) -> tuple[Float, Float]:
        """Return keys and values of tokens, decoded; pages that are on flash are faulted in.

        Returns:
            keys and values, both [len(tokens), n_kv_heads, head_dim] float32.

        Raises:
            TokenDropped, TokenPruned, TokenNotFound: a token is gone. CorruptPage, StoreError: its page cannot be read.
        """
        slots = self.table.find(layer, tokens)
        shape = (len(tokens), self.spec.n_kv_heads, self.spec.head_dim)
        keys, values = np.empty(shape, np.float32), np.empty(shape, np.float32)
        pages = slots // self.spec.page_size
        dropped = self.table.tier[layer, pages] == Tier.DROPPED
        if dropped.any():
            raise TokenDropped(
                f"token {int(tokens[dropped][0])} was dropped from layer {layer} to stay within the memory budget;"
                " give more memory, or an offload folder"
            )
        for page in np.unique(pages):
            chosen = pages == page
            k, v = self._decode(layer, int(page))
            inside = slots[chosen] - page * self.spec.page_size
            keys[chosen], values[chosen] = k[:, inside].transpose(1, 0, 2), v[:, inside].transpose(1, 0, 2)
            self.table.last_used[layer, page] = self.manager.step
        return keys, values

    def _decode(self, layer: int, page: int) -> tuple[Float, Float]:
        """Decode one page to [n_kv_heads, page_size, head_dim] float32 twice."""
        spec, table = self.spec, self.table
        if offloaded(table.tier[layer, page]):
            if not self.manager.arena.half_free_frames:
                self.manager.make_room(1)
            self.manager.bring(layer, [page])
        offset = int(table.offset[layer, page])
        if table.tier[layer, page] == Tier.HOT:
            return unpack_hot(
                self.manager.arena.page(offset, spec.hot_bytes), spec.n_kv_heads, spec.head_dim, spec.page_size
            )
        return unpack_warm(
            self.manager.arena.page(offset, spec.warm_bytes), spec.n_kv_heads, spec.head_dim, spec.page_size
        )

    def touch(self, layer: int, mass: Float) -> None:
        """Record the attention mass [n_pages] of a step: pages at or above their fair share count as used."""
        table, n_pages = self.table, mass.size
        if n_pages:
            table.mass[layer, :n_pages] += mass
            table.last_used[layer, :n_pages][mass * n_pages >= 1.0] = self.manager.step

    def touch_all(self, mass: Float) -> None:
        """Do :meth:`touch` for every layer at once, with mass [n_layers, n_pages]."""
        table, n_pages = self.table, mass.shape[1]
        if n_pages:
            table.mass[:, :n_pages] += mass
            np.copyto(table.last_used[:, :n_pages], self.manager.step, where=mass * n_pages >= 1.0)

    def prune(self, tokens: Int) -> int:
        """Remove tokens from every layer that holds them; pages left without a token are freed in every tier.

        Tokens that were pruned before are ignored.

        Returns:
            how many tokens were removed, counted per layer.

        Raises:
            TokenNotFound: a token was never in the cache. Nothing changed.
        """
        table, page_size = self.table, self.spec.page_size
        tokens = np.unique(tokens)
        held = [table.holds(layer, tokens) for layer in range(self.spec.n_layers)]
        behind = (tokens >= 0) & (tokens < int(table.passed.max()) * page_size)
        known = np.any(held, axis=0) | behind
        for token in tokens[~known].tolist():
            if not any(token in pruned for pruned in table.pruned):
                raise TokenNotFound(f"token {token} is not in the cache, so it cannot be pruned; nothing was changed")
        removed = 0
        for layer in range(self.spec.n_layers):
            chosen = tokens[held[layer]]
            table.pruned[layer].update(tokens[held[layer] | (tokens < int(table.passed[layer]) * page_size)].tolist())
            if not chosen.size:
                continue
            slots = table.find(layer, chosen)
            table.tokens[layer, slots] = NOTHING
            removed += len(slots)
            for slot in slots.tolist():
                table.set_live(layer, slot // page_size, slot % page_size, slot % page_size + 1, live=False)
            for page in np.unique(slots // page_size).tolist():
                if table.live_slots(layer, page) == 0:
                    self.manager.free_page(layer, page)
            merge_pages(self.manager, layer)
        self.manager.counters.tokens_pruned += removed
        return removed

    def pruned(self) -> Int:
        """Return the tokens [n] that were pruned, in order; those among them that :meth:`truncate` forgot too."""
        tokens: Int = np.array(sorted(set().union(*self.table.pruned)), np.int64)
        return tokens

    def truncate(self, n_slots: int) -> int:
        """Keep the first ``n_slots`` slots of every layer and forget the rest.

        A page is quantised once, so a compressed page cannot be reopened: when the cut falls inside one, the
        whole page goes. When a token behind the cut would see pages that were freed since no later one did, all goes.

        Returns:
            how many slots were kept in the longest layer: ``n_slots``, or less by up to a page, or none.
        """
        table, page_size = self.table, self.spec.page_size
        cut = n_slots // page_size
        if n_slots % page_size:
            reaching = table.n_slots > n_slots
            tiers = table.tier[reaching, cut] if cut < table.max_pages else np.empty(0)
            if not np.isin(tiers, (Tier.HOT, Tier.FREE)).all():
                n_slots = cut * page_size
        if self.table.passed.any() and (n_slots - table.windows + 1 < table.passed * page_size)[table.passed > 0].any():
            n_slots = cut = 0
        first_gone = -(-n_slots // page_size)
        for layer in range(self.spec.n_layers):
            if table.n_slots[layer] <= n_slots:
                continue
            for page in range(first_gone, table.n_pages(layer)):
                self.manager.free_page(layer, page)
            if n_slots % page_size:
                table.set_live(layer, cut, n_slots % page_size, page_size, live=False)
                table.content[layer, cut] = UNSETTLED
                table.refs["n_slots"][layer, cut] = n_slots % page_size
                if table.live_slots(layer, cut) == 0:
                    self.manager.free_page(layer, cut)
            table.tokens[layer, n_slots : int(table.n_slots[layer])] = NOTHING
            table.n_slots[layer] = n_slots
            # Tokens that arrived behind the cut, and that a merge has moved before it.
            late = np.flatnonzero(
                (table.arrived[layer, :n_slots] >= n_slots) & (table.tokens[layer, :n_slots] != NOTHING)
            )
            table.tokens[layer, late] = NOTHING
            for slot in late.tolist():
                table.set_live(layer, slot // page_size, slot % page_size, slot % page_size + 1, live=False)
            for page in np.unique(late // page_size).tolist():
                if table.live_slots(layer, page) == 0:
                    self.manager.free_page(layer, page)
        if not n_slots:
            table.passed[:] = table.passed_tokens[:] = 0
            if self.manager.summaries is not None:
                self.manager.summaries.clear()
        return min(n_slots, int(table.n_slots.max()))

    def pin(self, n_tokens: int) -> None:
        """Pin the pages of the first ``n_tokens`` of the sequence, those yet to come too, and no others.

        Reclaim offloads them last and never drops them, and selective attention always takes them.
        """
        n_pages = -(-n_tokens // self.spec.page_size)
        self.table.grow(n_pages)
        self.table.marked[:] = False
        self.table.marked[:, :n_pages] = True

    def use(self) -> CacheUse:
        """Return how much the cache holds now, by tier."""
        counts = {name: int(np.count_nonzero(self.table.tier == tier)) for tier, name in enumerate(Tier.NAMES)}
        size = {
            "HOT": self.spec.hot_bytes,
            "WARM": self.spec.warm_bytes,
            "COLD": self.spec.warm_bytes,
            "REMOTE": self.spec.warm_bytes,
        }
        return CacheUse(
            tokens=max(self.table.count(layer) for layer in range(self.spec.n_layers)),
            budget_bytes=self.manager.options.budget_bytes,
            arena_bytes=self.manager.arena.used_bytes,
            pinned_pages=int(np.count_nonzero(self.table.marked & (self.table.tier < Tier.FREE))),
            pages_by_tier=counts,
            bytes_by_tier={name: count * size.get(name, 0) for name, count in counts.items()},
        )

    def check(self) -> None:
        """Assert the invariants of the cache and its pages."""
        check_pages(self.manager)
        table = self.table
        for layer in range(self.spec.n_layers):
            for page in range(table.max_pages):
                held = table.tokens[layer, page * self.spec.page_size : (page + 1) * self.spec.page_size] != NOTHING
                if table.tier[layer, page] == Tier.FREE:
                    assert not held.any(), "tokens in a page that is free"
                else:
                    assert held.sum() == table.live_slots(layer, page) > 0, "mask and tokens differ"
