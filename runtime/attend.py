"""The seam at run time: attention over the pages of one layer, wherever they are.

All pages resident: one kernel call on the table's row. Some on flash: the pages are walked in logical order, and those on
flash pass through a small staging ring. The kernel merges fixed runs of pages in logical order, so both ways give
the same bits. Residency does not change here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekv.runtime.cache import KVCache
from edgekv.runtime.kernels import KIND_WARM, Kernels
from edgekv.spec import ModelSpec, PageSpec
from edgekv.types import Tier

Float = NDArray[np.float32]


def staging_pages(kernels: Kernels, spec: PageSpec) -> int:
    """Pages of the staging ring: one run of the kernel, or 256 KiB of records if that is more."""
    runs = -(-256 * 1024 // (spec.record_bytes * kernels.RUN_PAGES))
    return max(1, runs) * kernels.RUN_PAGES


class Attender:
    """Attends new tokens to a cache. One per sequence: it owns the staging ring."""

    def __init__(self, model: ModelSpec, cache: KVCache, kernels: Kernels, *, threads: int, max_tokens: int) -> None:
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
        self._ring: NDArray[np.uint8] = np.empty((0, cache.spec.warm_slot_bytes), np.uint8)
        self._ring_pages = staging_pages(kernels, cache.spec)
        self.missed_pages = 0

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
        refs, n_pages = resident.copy(), len(resident)
        if not len(self._ring):
            self._ring = np.empty((self._ring_pages, self._cache.spec.warm_slot_bytes), np.uint8)
        self.missed_pages += int(np.count_nonzero(tiers == Tier.DROPPED))
        self._attention.begin(q, k, v, positions, self._windows[layer], n_pages, mass is not None)
        start = 0
        while start < n_pages:
            stop, cold = start, 0
            while stop < n_pages:
                run = tiers[stop : stop + self._run_pages]
                in_run = int(np.count_nonzero(run == Tier.COLD))
                if cold + in_run > len(self._ring):
                    break
                stop, cold = stop + len(run), cold + in_run
            pages = (np.flatnonzero(tiers[start:stop] == Tier.COLD) + start).tolist()
            if pages:
                self._cache.manager.read_records(layer, pages, self._ring)
                stride = self._ring.strides[0]
                refs["data"][pages] = self._ring.ctypes.data + np.arange(len(pages), dtype=np.uint64) * np.uint64(
                    stride
                )
                refs["kind"][pages] = KIND_WARM
            self._attention.pages(refs, start, stop)
            start = stop
        self._attention.finish(out, mass)
