"""The seam at run time: attention over the pages of one layer, wherever they are.

All pages resident: one kernel call on the table's row. Some on flash: the pages are walked in logical order, and those on
flash pass through a small staging ring, read one piece ahead of the kernel, across layers. The kernel merges fixed runs of
pages in logical order, so both ways give the same bits, and residency does not change.

Under selective attention a step of one token attends to chosen pages only, and the resident set is a cache of them: a chosen
page that is on flash becomes resident if a page that was not chosen of late can leave for it, and is streamed otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgekv.settings import AttendOptions
from edgekv.spec import ModelSpec
from edgekv.tiers import Tier

from ..engines.base import StepBuffers
from ..kernels.interface import KIND_WARM, Kernels, StreamingAttention
from ..machine import HOST, Machine
from ..pages.budget import staging_ring
from ..pages.cache import KVCache
from ..pages.table import offloaded
from ..storage.interface import PageStore
from ..storage.record import Wanted
from ..storage.ring import PageReader
from .native_walk import Streaming
from .select import Choice, SelectionLog, Selector, make_selector
from .walk import Lookahead, Piece, wanted_records

Float = NDArray[np.float32]
#: Queries, keys, values and positions of the new tokens.
Step = tuple[Float, Float, Float, NDArray[np.int64]]


class Attender:
    """Attends new tokens to a cache. One per sequence: it owns the staging ring.

    Args:
        threads, executor: of the kernels' :meth:`~edgekv.runtime.kernels.interface.Kernels.ThreadPool`.
        piece_pages: pages that are read from flash at a time, a multiple of ``kernels.RUN_PAGES``.
        attend: which pages a step of one token attends to; None means all.
    """

    def __init__(
        self,
        model: ModelSpec,
        cache: KVCache,
        kernels: Kernels,
        *,
        threads: int,
        executor: int,
        max_tokens: int,
        piece_pages: int,
        ring_pieces: int,
        attend: AttendOptions | None = None,
        machine: Machine = HOST,
    ) -> None:
        self._cache = cache
        self._windows = model.windows
        self._n_q_heads = model.n_q_heads
        #: What selective attention did; empty under exact attention.
        self.selection = SelectionLog()
        self._taken: dict[int, NDArray[np.bool_]] = {}
        self._selector: Selector | None = None
        if attend is not None and attend.selective:
            self._selector = make_selector(model, cache, kernels, attend)
        self._pool = kernels.ThreadPool(threads, executor)
        self._attention = kernels.Attention(
            self._pool,
            model.n_q_heads,
            model.n_kv_heads,
            model.head_dim,
            cache.spec.page_size,
            model.softmax_scale,
            softcap=model.softcap,
            max_tokens=max_tokens,
        )
        self._piece_pages = piece_pages
        self._ring_pieces = ring_pieces
        self._run_pages = kernels.RUN_PAGES
        self._machine = machine
        self._meter = machine.meter
        self._reader: PageReader | None = None
        self._lookahead: Lookahead | None = None
        self._streaming: Streaming | None = None
        self._streamed: list[bool] = []  # by layer, whether the step under way streams it
        if cache.manager.store is not None:
            self.attach_store(cache.manager.store)

    def size_ring(self, budget_bytes: int) -> int:
        """Give the staging ring of a store to come the size that fits a budget; returns its bytes."""
        selective = self._selector is not None
        self._piece_pages, self._ring_pieces = staging_ring(self._cache.spec, budget_bytes, self._run_pages, selective)
        return self._ring_pieces * self._piece_pages * self._cache.spec.record_bytes

    def attach_store(self, store: PageStore) -> None:
        """Read pages back from a store from now on, through the staging ring."""
        spec = self._cache.spec
        self._reader = PageReader(store, spec, self._piece_pages, self._ring_pieces, self._pool, self._meter)
        self._lookahead = Lookahead(self._cache, self._reader, self._piece_pages, self._run_pages)
        attention = cast(StreamingAttention, self._attention)
        self._streaming = Streaming(self._cache, attention, self._reader, self._lookahead, self._windows, self._meter)

    def detach_store(self) -> None:
        """Read from no store any more, and give back the staging ring."""
        self.close()
        self._reader = self._lookahead = self._streaming = None

    def close(self) -> None:
        """End the reader's thread."""
        if self._reader is not None:
            self._reader.close()

    def attend(self, layer: int, q: Float, k: Float, v: Float, positions: NDArray[np.int64], out: Float) -> None:
        """Attend T new tokens to the pages of a layer and to themselves.

        Args:
            q, out: [T, n_q_heads, head_dim]. k, v: [T, n_kv_heads, head_dim]. positions: [T].

        Raises:
            CorruptPage, StoreError: a page on flash cannot be read; ``out`` must not be used.
        """
        table = self._cache.table
        n_pages = table.n_pages(layer)
        mass = np.zeros(n_pages, np.float32) if len(positions) == 1 else None
        step = (q, k, v, positions)
        if mass is not None and self.selects(n_pages):
            self._attend_chosen(layer, step, out, mass)
        else:
            seen = np.arange(n_pages) >= table.first_seen()[layer]
            missed = np.count_nonzero(seen & (table.tier[layer, :n_pages] == Tier.DROPPED))
            self._cache.manager.counters.pages_missed += int(missed)
            self._attend_pages(layer, step, out, mass, seen, None)
        if mass is not None:
            self._cache.touch(layer, mass)

    def selects(self, n_pages: int) -> bool:
        """Return whether a step of one token over so many pages leaves any of them out."""
        return self._selector is not None and self._selector.selects(n_pages)

    def reaches_all(self, n_pages: int) -> bool:
        """Return whether :meth:`attend_all` reaches the first pages of every layer: in RAM, or where the kernels can stream."""
        wanted = self._wanted(n_pages)
        if wanted.max(initial=Tier.HOT) < Tier.COLD:
            return True
        return self._streaming is not None and self._streaming.reaches(wanted)

    def _wanted(self, n_pages: int) -> NDArray[np.uint8]:
        """Return the tiers of those of the first pages of every layer that the next token sees, in any order."""
        table = self._cache.table
        tiers = table.tier[:, :n_pages]
        if not n_pages or tiers.max() < Tier.COLD:
            return tiers
        seen: NDArray[np.uint8] = tiers[table.seen()[:, :n_pages] & (tiers != Tier.FREE)]
        return seen

    def begin_all(self, refs: NDArray[np.void], position: int) -> None:
        """Begin a token's step at ``position`` over ``refs`` [n_layers, n_pages]; :meth:`attend_all` follows for each layer."""
        self._streamed = [False] * len(refs)
        # What has no address is on flash, or nothing that the kernels would look at.
        if self._streaming is not None and not refs["data"].all():
            n_pages = refs.shape[1]
            if self._wanted(n_pages).max(initial=Tier.HOT) == Tier.COLD:
                self._streamed = self._streaming.plan(n_pages)
        self._meter.token_began(refs, position)

    def attend_all(
        self, layer: int, buffers: StepBuffers, positions: NDArray[np.int64], refs: NDArray[np.void], mass: Float
    ) -> None:
        """Attend the tokens in ``buffers`` to all pages of a layer; the caller records ``mass`` [len(refs)].

        Raises:
            CorruptPage, StoreError: a page on flash cannot be read; the result must not be used.
        """
        if self._streamed[layer]:
            assert self._streaming is not None
            self._streaming.attend(layer, buffers, positions, refs, mass)
            return
        self._attention.run(
            buffers.q, buffers.k, buffers.v, positions, refs, buffers.attention, self._windows[layer], mass
        )
        self._meter.token_layer(layer, False)

    def _attend_chosen(self, layer: int, step: Step, out: Float, mass: Float) -> None:
        """Attend one token to the pages that the selector chooses, and count what that may have missed."""
        selector, cache = self._selector, self._cache
        assert selector is not None
        sums = np.empty((1, self._n_q_heads), np.float32)
        choice = selector.choose(layer, step[0][0], int(step[3][0]), self._windows[layer])
        before = cache.table.tier[layer, : len(mass)].copy()
        self._attend_taken(layer, step, out, mass, choice, sums)
        further = selector.extend(layer, choice, sums[0])
        if further is not None:
            choice = further
            self._attend_taken(layer, step, out, mass, choice, sums)
        self.selection.count(cache.manager.step, before, choice.taken, selector.missing(choice, sums[0]))
        cache.manager.counters.pages_missed += int(np.count_nonzero(choice.taken & (before == Tier.DROPPED)))
        self._predict((layer + 1) % cache.spec.n_layers)

    def _attend_taken(self, layer: int, step: Step, out: Float, mass: Float, choice: Choice, sums: Float) -> None:
        cache = self._cache
        cache.table.last_used[layer, : len(mass)][choice.taken] = cache.manager.step
        self._taken[layer] = choice.taken
        self._bring(layer, choice.taken)
        self._attend_pages(layer, step, out, mass, choice.taken, sums)

    def _bring(self, layer: int, taken: NDArray[np.bool_]) -> None:
        """Make the COLD pages among those taken resident, as far as there is room for them."""
        table, manager = self._cache.table, self._cache.manager
        cold = np.flatnonzero(taken & offloaded(table.tier[layer, : len(taken)])).tolist()
        if not cold:
            return
        cold = cold[: manager.room_for(len(cold), layer)]
        for start in range(0, len(cold), self._piece_pages):
            assert self._reader is not None
            pages = cold[start : start + self._piece_pages]
            _, rows = self._reader.take_partly(self._records(layer, pages))
            following = cold[start + self._piece_pages :][: self._piece_pages]
            if following:
                self._reader.request(self._records(layer, following))
            manager.bring(layer, pages, rows)
            manager.counters.pages_fetched += len(pages)

    def _predict(self, layer: int) -> None:
        """Start to read what the last step took in a layer, and is not in RAM."""
        taken = self._taken.get(layer)
        if taken is not None and self._reader is not None:
            cold = np.flatnonzero(taken & offloaded(self._cache.table.tier[layer, : len(taken)])).tolist()
            if cold:
                self._reader.request(self._records(layer, cold[: self._piece_pages]))

    def _attend_pages(
        self, layer: int, step: Step, out: Float, mass: Float | None, wanted: NDArray[np.bool_], sums: Float | None
    ) -> None:
        """Attend to the wanted pages of a layer; those on flash pass through the staging ring."""
        window, n_pages = self._windows[layer], len(wanted)
        refs = self._cache.table.refs[layer, :n_pages]
        cold = wanted & offloaded(self._cache.table.tier[layer, :n_pages])
        streams, whole = bool(cold.any()), sums is None
        if streams or not whole:
            refs = refs.copy()
            refs["data"][~wanted] = 0  # as for pages that were dropped, the kernel skips what has no address
        self._meter.attention_began(step[3], window)
        if not streams:
            self._attention.run(*step, refs, out, window, mass, sums)
            self._meter.attended(refs)
            self._meter.attention_ended()
            return
        assert self._lookahead is not None
        self._attention.begin(*step, window, n_pages, mass is not None)
        walk = self._lookahead.walk(layer, cold) if whole else self._chosen(layer, cold)
        for piece, addresses in walk:
            if addresses is not None:
                refs["data"][piece.pages] = addresses
                refs["kind"][piece.pages] = KIND_WARM
                self._cache.manager.counters.pages_fetched += len(piece.pages)
            self._attention.pages(refs, piece.start, piece.stop)
            self._meter.attended(refs[piece.start : piece.stop])
        self._attention.finish(out, mass, sums)
        self._meter.attention_ended()

    def _chosen(self, layer: int, cold: NDArray[np.bool_]) -> Iterator[tuple[Piece, NDArray[np.uint64] | None]]:
        """Yield the pieces of a layer as :meth:`Lookahead.walk` does, using what was guessed of the choice."""
        assert self._lookahead is not None
        assert self._reader is not None
        pieces = self._lookahead.pieces(layer, cold)
        for index, piece in enumerate(pieces):
            addresses = self._reader.take_partly(piece.wanted)[0] if piece.pages else None
            following = next((piece for piece in pieces[index + 1 :] if piece.pages), None)
            if following is not None:
                self._reader.request(following.wanted)
            yield piece, addresses

    def _records(self, layer: int, pages: list[int]) -> Wanted:
        return wanted_records(self._cache, layer, pages)
