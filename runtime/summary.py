"""What selective attention remembers of a page that may be on flash: per channel, its smallest and largest key.

With the true query, the pair gives an upper bound on any score in the page. Bounds are kept as the upper half of a
float32 (bfloat16), rounded outwards: half the RAM, and widened to float32 by a shift.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekv.runtime.kernels import Kernels
from edgekv.runtime.table import PageTable
from edgekv.spec import PageSpec

Float = NDArray[np.float32]
Bits = NDArray[np.uint16]

#: Relative to |q|_1 * max|bound| * scale: more than the rounding of a bound (float32 products of up to 512 channels,
#: each off by 2^-24) and of a kernel's score (queries in 16 bits, off by 2^-16) together.
SCORE_SLACK = 2.0**-14


def summary_bytes(spec: PageSpec, n_pages: int) -> int:
    """Bytes of RAM that the summaries of ``n_pages`` pages in every layer take."""
    return spec.n_layers * n_pages * 4 * spec.n_kv_heads * spec.head_dim


def _round_up(x: Float) -> Bits:
    """Return the smallest bfloat16 not below each x, as bits."""
    bits = x.view(np.uint32)
    inexact = (bits & 0xFFFF) != 0
    # Cutting the low half moves towards zero: up for a negative number already.
    return ((bits >> 16) + (inexact & (x > 0))).astype(np.uint16)


class Summaries:
    """Key bounds of the sealed pages of every layer; a page is ``known`` once it was seen in RAM."""

    def __init__(self, table: PageTable, kernels: Kernels) -> None:
        spec = table.spec
        self._table = table
        self._kernels = kernels
        self._spec = spec
        # [layer, KV head, page, low then high per channel]: what one layer needs lies in one piece per head.
        self._rows = np.zeros((spec.n_layers, spec.n_kv_heads, table.max_pages, 2 * spec.head_dim), np.uint16)
        self.known = np.zeros((spec.n_layers, table.max_pages), bool)
        self._largest = np.zeros(spec.n_layers, np.float32)
        self._wide = np.empty(0, np.uint32)

    @property
    def nbytes(self) -> int:
        """Bytes of RAM in use."""
        return self._rows.nbytes + self.known.nbytes + self._wide.nbytes

    def add(self, layer: int, pages: NDArray[np.int64], refs: NDArray[np.void]) -> None:
        """Summarise sealed pages; ``refs`` [len(pages)] say where they lie now."""
        self._grow()
        spec = self._spec
        shape = (len(pages), spec.n_kv_heads, spec.head_dim)
        low, high = np.empty(shape, np.float16), np.empty(shape, np.float16)
        self._kernels.page_bounds(np.ascontiguousarray(refs), low, high, spec.page_size)
        wide_low, wide_high = low.astype(np.float32), high.astype(np.float32)
        rows = self._rows[layer]
        rows[:, pages, : spec.head_dim] = (_round_up(-wide_low) ^ 0x8000).transpose(1, 0, 2)
        rows[:, pages, spec.head_dim :] = _round_up(wide_high).transpose(1, 0, 2)
        # bfloat16 rounds away from zero by less than one part in 128.
        largest = max(float(np.abs(wide_low).max(initial=0)), float(np.abs(wide_high).max(initial=0))) * 1.01
        self._largest[layer] = max(float(self._largest[layer]), largest)
        self.known[layer, pages] = True

    def forget(self, layer: int, page: int) -> None:
        """Note that a page is not, or no longer, what was summarised."""
        if page < self.known.shape[1]:
            self.known[layer, page] = False

    def scores(self, layer: int, q: Float, n_pages: int, scale: float) -> tuple[Float, Float]:
        """Bound the scores of one query per head in the first ``n_pages`` pages of a layer.

        Args:
            q: [n_q_heads, head_dim]. scale: multiplies the scores.

        Returns:
            bounds [n_q_heads, n_pages], no live slot of the page scores higher (infinity where a page is not known);
            and slack [n_q_heads], the part of them that covers rounding, here and in the kernel.
        """
        self._grow()
        spec = self._spec
        shape = (spec.n_kv_heads, n_pages, 2 * spec.head_dim)
        if self._wide.shape != shape:
            self._wide = np.empty(shape, np.uint32)
        self._wide[...] = self._rows[layer, :, :n_pages]
        np.left_shift(self._wide, 16, out=self._wide)
        grouped = q.reshape(spec.n_kv_heads, -1, spec.head_dim).transpose(0, 2, 1) * np.float32(scale)
        weights = np.concatenate([np.minimum(grouped, 0), np.maximum(grouped, 0)], axis=1)
        with np.errstate(invalid="ignore", over="ignore"):
            bounds = np.matmul(self._wide.view(np.float32), weights)  # [n_kv_heads, n_pages, group]
        slack = np.float32(SCORE_SLACK) * np.abs(weights).sum(axis=1).reshape(-1) * self._largest[layer]
        flat = bounds.transpose(0, 2, 1).reshape(-1, n_pages) + slack[:, None]
        flat[:, ~self.known[layer, :n_pages]] = np.inf
        return np.where(np.isnan(flat), np.float32(np.inf), flat), slack

    def _grow(self) -> None:
        extra = self._table.max_pages - self.known.shape[1]
        if extra > 0:
            self._rows = np.pad(self._rows, ((0, 0), (0, 0), (0, extra), (0, 0)))
            self.known = np.pad(self.known, ((0, 0), (0, extra)))
