"""The short way to pages on flash: the kernels walk, read ahead, check and attend without the interpreter in between.

For a step of one token over a cache whose pages are in RAM or in one page file. The plan of what is read, layer by layer, changes
only when a page moves, so it is handed over once and walked many times. Everything else takes the general way
(:meth:`Attender.attend`), to the same bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekv.spec import RECORD_HEAD_BYTES
from edgekv.tiers import Tier

from ..engines.base import StepBuffers
from ..kernels.interface import StreamingAttention
from ..meter import Meter
from ..pages.cache import KVCache
from ..storage.flash import FlashStore
from ..storage.ring import PageReader
from .walk import Lookahead, Piece

Float = NDArray[np.float32]


class Streaming:
    """Streams the layers of one cache through the ring of its reader."""

    def __init__(
        self,
        cache: KVCache,
        attention: StreamingAttention,
        reader: PageReader,
        lookahead: Lookahead,
        windows: tuple[int, ...],
        meter: Meter,
    ) -> None:
        self._cache = cache
        self._attention = attention
        self._reader = reader
        self._lookahead = lookahead
        self._windows = windows
        self._meter = meter
        self._stream = reader.stream(cache.spec.n_layers)
        self._tiers: NDArray[np.uint8] = np.empty((0, 0), np.uint8)
        self._records: NDArray[np.int64] = np.empty((0, 0), np.int64)
        self._pieces: list[list[Piece]] = []
        self._streamed: list[bool] = []

    def reaches(self, tiers: NDArray[np.uint8]) -> bool:
        """Say whether pages in these tiers are all in RAM or in one page file."""
        return self._stream is not None and bool(tiers.max() <= Tier.COLD)

    def plan(self, n_pages: int) -> list[bool]:
        """Plan a step over ``n_pages`` in every layer, which :meth:`reaches`; returns which layers have pages on flash."""
        store, table = self._cache.manager.store, self._cache.table
        assert self._stream is not None
        assert isinstance(store, FlashStore)
        tiers, records = table.tier[:, :n_pages], table.record[:, :n_pages]
        if table.has_windows:
            tiers = np.where(table.seen()[:, :n_pages], tiers, np.uint8(Tier.FREE))
        self._reader.forget()
        self._reader.refresh()
        if np.array_equal(tiers, self._tiers) and np.array_equal(records, self._records):
            return self._streamed
        self._tiers, self._records = tiers.copy(), records.copy()
        self._pieces = [self._lookahead.pieces(layer, cold) for layer, cold in enumerate(self._tiers == Tier.COLD)]
        self._streamed = [any(piece.pages for piece in pieces) for pieces in self._pieces]
        for layer, pieces in enumerate(self._pieces):
            used = pieces if self._streamed[layer] else []
            stops = np.array([piece.stop for piece in used], np.int64)
            counts = np.array([len(piece.pages) for piece in used], np.int64)
            pages = np.array([page for piece in used for page in piece.pages], np.int64)
            places = np.array([record for piece in used for record in piece.wanted.records], np.int64)
            heads = np.concatenate(
                [np.empty((0, RECORD_HEAD_BYTES), np.uint8), *(piece.wanted.heads for piece in used)]
            )
            payload_bytes = self._cache.spec.warm_bytes
            self._stream.plan(layer, store.file.direct, stops, counts, pages, places, heads, payload_bytes)
            self._meter.planned(layer, stops, counts, pages, places)
        return self._streamed

    def attend(
        self, layer: int, buffers: StepBuffers, positions: NDArray[np.int64], refs: NDArray[np.void], mass: Float
    ) -> None:
        """Attend the token in ``buffers`` to all pages of a layer; the caller records ``mass`` [len(refs)].

        Raises:
            CorruptPage, StoreError: a page on flash cannot be read; the result must not be used.
        """
        store, wanted = self._cache.manager.store, [piece.wanted for piece in self._pieces[layer]]
        assert isinstance(store, FlashStore)
        assert self._stream is not None
        reads = self._stream.reads
        try:
            bad = self._attention.stream(
                self._stream, layer, buffers.q, buffers.k, buffers.v, positions, refs, buffers.attention,
                self._windows[layer], mass,
            )  # fmt: skip
            bad = max(bad, self._meter.token_layer(layer, True))
        except OSError as error:
            raise store.unreadable(error) from error
        count = sum(len(one.records) for one in wanted)
        if bad >= 0:
            good = [row != bad for row in range(count)]
            store.count([r for one in wanted for r in one.records], [t for one in wanted for t in one.tags], good)
        store.counters.reads += self._stream.reads - reads
        store.counters.records_read += count
        store.counters.bytes_read += count * store.spec.record_bytes
        self._cache.manager.counters.pages_fetched += count
