"""What selective attention remembers of a page that may be on flash: per channel, its smallest and largest key.

With the true query, the pair gives an upper bound on any score in the page. Bounds are 8-bit codes, rounded outwards, with
one scale per layer, head and channel that grows as pages come: a page of 16 tokens costs 1/18 of its INT8 size in RAM, one
of 32 tokens 1/34.
The first page holds attention sinks, whose outliers would spoil the scales: it is always attended to, and not summarised.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekv.spec import PageSpec

from ..kernels.interface import Kernels
from .table import PageTable

Float = NDArray[np.float32]

#: Relative to the largest score that the scales allow: more than the rounding of a bound (float32 products of up to 512
#: channels, each off by 2^-24) and of a kernel's score (queries in 16 bits, off by 2^-16) together.
SCORE_SLACK = 2.0**-14
#: How far from the middle of its bounds to their end the best key of a page is taken to reach: it is never at the end in
#: all channels at once. Source: passkey at 4096 tokens on the bundled model, 0.4 finds what 1.0 misses (docs/flash.md).
LIKELY = 0.4
#: Largest code: one less than the largest int8, so that rounding outwards cannot overflow.
CODES = 126
#: A scale that must grow grows beyond need, so that it seldom does.
HEADROOM = 1.25
#: Codes are rounded outwards by at least this, which covers the rounding of float32.
OUTWARDS = np.float32(1e-4)
#: Of a channel that no page has shown yet.
LEAST_SCALE = np.float32(1e-20)


def summary_bytes(spec: PageSpec, n_pages: int) -> int:
    """Bytes of RAM that the summaries of ``n_pages`` pages in every layer take."""
    return spec.n_layers * (n_pages + 2) * 2 * spec.n_kv_heads * spec.head_dim


class Summaries:
    """Key bounds of the sealed pages of every layer; a page is ``known`` once it was seen in RAM."""

    def __init__(self, table: PageTable, kernels: Kernels) -> None:
        spec = table.spec
        self._table = table
        self._kernels = kernels
        self._spec = spec
        # [layer, KV head, page, low then high per channel]: what one layer needs lies in one piece per head.
        self._codes = np.zeros((spec.n_layers, spec.n_kv_heads, table.max_pages, 2 * spec.head_dim), np.int8)
        self._scales = np.full((spec.n_layers, spec.n_kv_heads, spec.head_dim), LEAST_SCALE, np.float32)
        self.known = np.zeros((spec.n_layers, table.max_pages), bool)
        self._wide: Float = np.empty((0, 0, 0), np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of RAM that bounds and scales take."""
        return self._codes.nbytes + self._scales.nbytes

    def add(self, layer: int, pages: NDArray[np.int64], refs: NDArray[np.void]) -> None:
        """Summarise sealed pages; ``refs`` [len(pages)] say where they lie now.

        Pages are added as they are sealed, in order, so that scales do not depend on which pages are in RAM.
        """
        self._grow()
        spec = self._spec
        shape = (len(pages), spec.n_kv_heads, spec.head_dim)
        halves = np.empty(shape, np.float16), np.empty(shape, np.float16)
        self._kernels.page_bounds(np.ascontiguousarray(refs), *halves, spec.page_size)
        low, high = (half.astype(np.float32) for half in halves)
        # Keys beyond fp16 have no bound: such a page stays unknown.
        usable = (pages > 0) & np.isfinite(low).all(axis=(1, 2)) & np.isfinite(high).all(axis=(1, 2))
        pages, low, high = pages[usable], low[usable], high[usable]
        if not pages.size:
            return
        self._widen(layer, np.maximum(-low, high).max(axis=0))
        scales, rows = self._scales[layer], self._codes[layer]
        rows[:, pages, : spec.head_dim] = np.floor(low / scales - OUTWARDS).transpose(1, 0, 2)
        rows[:, pages, spec.head_dim :] = np.ceil(high / scales + OUTWARDS).transpose(1, 0, 2)
        self.known[layer, pages] = True

    def _widen(self, layer: int, needed: Float) -> None:
        """Let the scales of a layer reach ``needed`` [n_kv_heads, head_dim]."""
        scales, size = self._scales[layer], self._spec.head_dim
        grown = np.where(needed > CODES * scales, needed * np.float32(HEADROOM / CODES), scales)
        if (grown == scales).all():
            return
        ratio = (scales / grown)[:, None, :]
        rows = self._codes[layer]
        low, high = rows[..., :size], rows[..., size:]
        # Channels whose scale stays keep their codes: rounding outwards again would widen them for nothing.
        low[...] = np.where(ratio < 1, np.floor(low * ratio - OUTWARDS), low)
        high[...] = np.where(ratio < 1, np.ceil(high * ratio + OUTWARDS), high)
        self._scales[layer] = grown

    def forget(self, layer: int, page: int) -> None:
        """Note that a page is not, or no longer, what was summarised."""
        if page < self.known.shape[1]:
            self.known[layer, page] = False

    def clear(self) -> None:
        """Forget all pages, and how far their keys reached: they have no say in what is chosen from those to come."""
        self.known[:] = False
        self._scales[:] = LEAST_SCALE

    def scores(self, layer: int, q: Float, n_pages: int, scale: float) -> tuple[Float, Float, Float]:
        """Bound the scores of one query per head in the first ``n_pages`` pages of a layer.

        Args:
            q: [n_q_heads, head_dim]. scale: multiplies the scores.

        Returns:
            bounds [n_q_heads, n_pages], no live slot of the page scores higher (infinity where a page is not known);
            likely [n_q_heads, n_pages], about what its best slot scores; and slack [n_q_heads], the part of the bounds that
            covers rounding, here and in the kernel.
        """
        self._grow()
        spec = self._spec
        shape = (spec.n_kv_heads, n_pages, 2 * spec.head_dim)
        if self._wide.shape != shape:
            self._wide = np.empty(shape, np.float32)
        self._wide[...] = self._codes[layer, :, :n_pages]
        grouped = q.reshape(spec.n_kv_heads, -1, spec.head_dim).transpose(0, 2, 1)
        grouped = grouped * (self._scales[layer] * np.float32(scale))[:, :, None]
        down, up = np.minimum(grouped, 0), np.maximum(grouped, 0)
        near, far = np.float32((1 + LIKELY) / 2), np.float32((1 - LIKELY) / 2)
        corner, inner = [down, up], [near * down + far * up, far * down + near * up]
        weights = np.concatenate([np.concatenate(rows, axis=1) for rows in (corner, inner)], axis=2)
        with np.errstate(invalid="ignore", over="ignore"):
            scores = np.matmul(self._wide, weights)  # [n_kv_heads, n_pages, 2 * group]
        group = grouped.shape[2]
        slack: Float = np.float32(SCORE_SLACK * CODES) * np.abs(grouped).sum(axis=1).reshape(-1)
        flat: Float = scores[..., :group].transpose(0, 2, 1).reshape(-1, n_pages) + slack[:, None]
        likely: Float = scores[..., group:].transpose(0, 2, 1).reshape(-1, n_pages)
        flat[:, ~self.known[layer, :n_pages]] = np.inf
        np.nan_to_num(flat, copy=False, nan=np.inf, posinf=np.inf, neginf=-np.inf)
        return flat, likely, slack

    def _grow(self) -> None:
        extra = self._table.max_pages - self.known.shape[1]
        if extra > 0:
            self._codes = np.pad(self._codes, ((0, 0), (0, 0), (0, extra), (0, 0)))
            self.known = np.pad(self.known, ((0, 0), (0, extra)))
