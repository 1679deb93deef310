"""The seam at run time: attention over the pages of one layer, wherever they are.

All pages resident: one kernel call on the table's row. Some on flash: the pages are walked in logical order, and those on
flash pass through a small staging ring, read one piece ahead of the kernel, across layers. The kernel merges fixed runs of
pages in logical order, so both ways give the same bits. Residency does not change here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekv.runtime.cache import KVCache
from edgekv.runtime.engines.base import StepBuffers
from edgekv.runtime.kernels import KIND_WARM, Kernels
from edgekv.runtime.pages import tag
from edgekv.runtime.reader import PageReader
from edgekv.spec import ModelSpec
from edgekv.types import Tier

Float = NDArray[np.float32]


class Attender:
    """Attends new tokens to a cache. One per sequence: it owns the staging ring.

    Args:
        piece_pages: pages that are read from flash at a time, a multiple of ``kernels.RUN_PAGES``.
    """

    def __init__(
        self, model: ModelSpec, cache: KVCache, kernels: Kernels, *, threads: int, max_tokens: int, piece_pages: int
    ) -> None:
        self._cache = cache
        self._windows = model.windows
        self._run_pages = kernels.RUN_PAGES
        self._attention = kernels.Attention(
            kernels.ThreadPool(threads),
            model.n_q_heads,
            model.n_kv_heads,
            model.head_dim,
            cache.spec.page_size,
            model.softmax_scale,
            max_tokens=max_tokens,
        )
        self._piece_pages = piece_pages
        store = cache.manager.store
        self._reader = PageReader(store, cache.spec, piece_pages) if store is not None else None

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
        refs = table.refs[layer, :n_pages]
        tiers = table.tier[layer, :n_pages]
        mass = np.zeros(n_pages, np.float32) if len(positions) == 1 else None
        if tiers.max(initial=0) < Tier.COLD:
            self._attention.run(q, k, v, positions, refs, out, window=self._windows[layer], page_mass=mass)
        else:
            self._stream(layer, q, k, v, positions, refs, tiers, out, mass)
        if mass is not None:
            self._cache.touch(layer, mass)

    def attend_resident(
        self, layer: int, buffers: StepBuffers, positions: NDArray[np.int64], refs: NDArray[np.void], mass: Float
    ) -> None:
        """Attend the tokens in ``buffers`` to pages that are all in RAM; the caller records ``mass`` [len(refs)]."""
        self._attention.run(
            buffers.q, buffers.k, buffers.v, positions, refs, buffers.attention, self._windows[layer], mass
        )

    def _stream(
        self,
        layer: int,
        q: Float,
        k: Float,
        v: Float,
        positions: NDArray[np.int64],
        resident: NDArray[np.void],
        tiers: NDArray[np.uint8],
        out: Float,
        mass: Float | None,
    ) -> None:
        assert self._reader is not None
        counters = self._cache.manager.counters
        counters.pages_missed += int(np.count_nonzero(tiers == Tier.DROPPED))
        refs = resident.copy()
        self._attention.begin(q, k, v, positions, self._windows[layer], len(refs), mass is not None)
        pieces = self._pieces(layer)
        for index, (start, stop, cold) in enumerate(pieces):
            if cold:
                refs["data"][cold], _ = self._reader.take(*self._records(layer, cold))
                refs["kind"][cold] = KIND_WARM
                counters.pages_fetched += len(cold)
            self._request_next(layer, pieces[index + 1 :])
            self._attention.pages(refs, start, stop)
        self._attention.finish(out, mass)

    def _pieces(self, layer: int) -> list[tuple[int, int, list[int]]]:
        """Cut the pages of a layer into pieces [start, stop) of whole runs, with the COLD pages of each."""
        tiers = self._cache.table.tier[layer, : self._cache.table.n_pages(layer)]
        pieces: list[tuple[int, int, list[int]]] = []
        start = 0
        cold: list[int] = []
        for run in range(0, len(tiers), self._run_pages):
            stop = min(run + self._run_pages, len(tiers))
            in_run = (np.flatnonzero(tiers[run:stop] == Tier.COLD) + run).tolist()
            if len(cold) + len(in_run) > self._piece_pages:
                pieces.append((start, run, cold))
                start, cold = run, []
            cold = cold + in_run
        pieces.append((start, len(tiers), cold))
        return pieces

    def _request_next(self, layer: int, rest: list[tuple[int, int, list[int]]]) -> None:
        """Start to read what is needed next: in this layer, or at the start of the next one."""
        assert self._reader is not None
        following = (layer + 1) % self._cache.spec.n_layers
        for at, pieces in ((layer, rest), (following, self._pieces(following))):
            for _, _, cold in pieces:
                if cold:
                    self._reader.request(*self._records(at, cold))
                    return

    def _records(self, layer: int, pages: list[int]) -> tuple[list[int], list[int]]:
        return self._cache.table.record[layer, pages].tolist(), [tag(layer, page) for page in pages]
