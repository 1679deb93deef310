"""The kernels in NumPy: what runs where the native extension is missing. Same names, same meaning, slow.

As in the native kernels, pages are attended in fixed runs of RUN_PAGES and the runs' softmax states are merged in
logical order, so that a result does not depend on how a step is cut into pieces.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.spec import PageSpec

from .interface import BuildFacts, Float, Int64, Refs
from .numpy_pages import RecordReader as RecordReader
from .numpy_pages import check_array, check_refs, decode_page, live_slots
from .numpy_pages import checksums as checksums
from .numpy_pages import pack_warm as pack_warm
from .numpy_pages import pack_warm_many as pack_warm_many
from .numpy_pages import page_bounds as page_bounds
from .numpy_pages import read_seconds as read_seconds
from .numpy_pages import write_hot as write_hot

RUN_PAGES = 8
#: Scores are clamped to this, so that a masked score stays below every real one without an infinity.
SCORE_LIMIT = np.float32(1e30)

Bools = NDArray[np.bool_]


def isa() -> str:
    """Name of the instruction set in use."""
    return "numpy"


def build() -> BuildFacts:
    """Nothing was compiled."""
    return {"commit": "", "processor": "", "isas": "", "c_library": "", "compiler": ""}


def available_isas() -> tuple[str, ...]:
    """Names of the instruction sets to choose from."""
    return ("numpy",)


@dataclass(frozen=True)
class ThreadPool:
    """Stands for the native pool; NumPy's own threads do the work."""

    n_threads: int
    executor: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.n_threads <= 256:
            raise ValueError("n_threads must be 1..256")


@dataclass
class _State:
    """A softmax in progress per query head and token: [n_q_heads, T], and acc with a last axis head_dim."""

    peak: Float
    total: Float
    acc: Float

    def merge(self, other: _State) -> tuple[Float, Float]:
        """Add another state; returns what the old and the other's sums were multiplied by."""
        peak = np.maximum(self.peak, other.peak)
        keep, add = np.exp(self.peak - peak), np.exp(other.peak - peak)
        self.peak = peak
        self.total = self.total * keep + other.total * add
        self.acc = self.acc * keep[..., None] + other.acc * add[..., None]
        return keep, add


class Attention:
    """Attention of one layer's geometry; see :class:`edgekv.runtime.kernels.PagedAttention`."""

    def __init__(
        self,
        pool: Any,
        n_q_heads: int,
        n_kv_heads: int,
        head_dim: int,
        page_size: int,
        scale: float,
        softcap: float = 0.0,
        sinks: Float | None = None,
        max_tokens: int = 512,
        isa: str = "",
    ) -> None:
        if n_kv_heads < 1 or n_q_heads < 1 or n_q_heads % n_kv_heads:
            raise ValueError("n_q_heads must be a positive multiple of n_kv_heads")
        if max_tokens < 1:
            raise ValueError("max_tokens must be at least 1")
        if not softcap >= 0:
            raise ValueError("softcap must not be negative")
        if isa not in ("", "numpy"):
            raise ValueError(f"isa names no instruction set of the NumPy kernels: {isa!r}")
        self._spec = PageSpec(1, n_kv_heads, head_dim, page_size)
        self._n_q_heads = n_q_heads
        self._scale, self._softcap = np.float32(scale), np.float32(softcap)
        self._sinks: Float | None = None
        if sinks is not None:
            check_array("sinks", sinks, np.float32, (n_q_heads,))
            self._sinks = np.clip(sinks, -SCORE_LIMIT, SCORE_LIMIT)
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        self._n_pages = -1  # no step begun
        self._next = 0

    @property
    def isa(self) -> str:
        """Name of the instruction set in use."""
        return "numpy"

    @property
    def buffer_bytes(self) -> int:
        """Memory held for intermediate results between calls."""
        return 0

    def run(
        self,
        q: Float,
        new_k: Float,
        new_v: Float,
        positions: Int64,
        refs: Refs,
        out: Float,
        window: int = 0,
        page_mass: Float | None = None,
        log_sum_exp: Float | None = None,
    ) -> None:
        """Attend new tokens to ``refs`` and to themselves."""
        check_refs(refs)
        check_array("out", out, np.float32, (len(q), self._n_q_heads, self._spec.head_dim), writable=True)
        if page_mass is not None:
            check_array("page_mass", page_mass, np.float32, (len(refs),), writable=True)
        self.begin(q, new_k, new_v, positions, window, len(refs), page_mass is not None)
        self.pages(refs, 0, len(refs))
        self.finish(out, page_mass, log_sum_exp)

    def begin(
        self,
        q: Float,
        new_k: Float,
        new_v: Float,
        positions: Int64,
        window: int,
        n_pages: int,
        want_mass: bool = False,
    ) -> None:
        """Start a step whose pages come in pieces."""
        spec = self._spec
        n_new = len(q)
        if not 1 <= n_new <= self._max_tokens:
            raise ValueError(f"q must have 1..{self._max_tokens} tokens, not {n_new}")
        check_array("q", q, np.float32, (n_new, self._n_q_heads, spec.head_dim))
        check_array("new_k", new_k, np.float32, (n_new, spec.n_kv_heads, spec.head_dim))
        check_array("new_v", new_v, np.float32, (n_new, spec.n_kv_heads, spec.head_dim))
        check_array("positions", positions, np.int64, (n_new,))
        if window < 0:
            raise ValueError("window must not be negative")
        if n_pages < 0:
            raise ValueError("n_pages must not be negative")
        if np.any(np.diff(positions) <= 0):
            raise ValueError("positions must increase")
        with self._use():
            scaled = np.clip(q * self._scale, -SCORE_LIMIT, SCORE_LIMIT)
            self._q = np.ascontiguousarray(scaled.transpose(1, 0, 2))
            self._k, self._v = new_k.transpose(1, 0, 2).copy(), new_v.transpose(1, 0, 2).copy()
            self._positions, self._window = positions.copy(), window
            self._n_pages, self._next = n_pages, 0
            self._state = self._empty()
            # Per run: the mass of each page relative to the peak at the run's end, and that peak.
            self._mass: list[tuple[Float, Float]] | None = [] if want_mass else None

    def pages(self, refs: Refs, start: int, stop: int) -> None:
        """Attend to ``refs[start:stop)``."""
        check_refs(refs)
        if self._n_pages < 0:
            raise ValueError("pages() before begin()")
        if len(refs) != self._n_pages:
            raise ValueError("refs must have as many rows as begin() said")
        if start != self._next:
            raise ValueError("start must be where the last piece stopped")
        if stop < start or stop > len(refs) or (stop % RUN_PAGES and stop != len(refs)):
            raise ValueError("stop must be a multiple of RUN_PAGES from start on, or the number of pages")
        with self._use():
            for first in range(start, stop, RUN_PAGES):
                self._attend_run(refs[first : min(first + RUN_PAGES, stop)])
            self._next = stop

    def finish(self, out: Float, page_mass: Float | None = None, log_sum_exp: Float | None = None) -> None:
        """Attend to the new tokens themselves and write the result."""
        if self._n_pages < 0:
            raise ValueError("finish() before begin()")
        if self._next != self._n_pages:
            raise ValueError("finish() before the last page")
        n_new = self._q.shape[1]
        check_array("out", out, np.float32, (n_new, self._n_q_heads, self._spec.head_dim), writable=True)
        if page_mass is not None:
            if self._mass is None:
                raise ValueError("page_mass was not asked for in begin()")
            check_array("page_mass", page_mass, np.float32, (self._n_pages,), writable=True)
        if log_sum_exp is not None:
            check_array("log_sum_exp", log_sum_exp, np.float32, (n_new, self._n_q_heads), writable=True)
        with self._use():
            visible = np.tril(np.ones((n_new, n_new), bool))
            if self._window:
                visible &= self._positions[:, None] - self._positions[None, :] < self._window
            own, _ = self._attend(self._k, self._v, visible)
            self._state.merge(own)
            if self._sinks is not None:
                sinks = np.broadcast_to(self._sinks[:, None], self._state.peak.shape)
                nothing = np.zeros_like(self._state.acc)
                self._state.merge(_State(sinks, np.ones_like(sinks), nothing))
            state = self._state
            inverse = np.divide(1, state.total, out=np.zeros_like(state.total), where=state.total > 0)
            out[:] = (state.acc * inverse[..., None]).transpose(1, 0, 2)
            if log_sum_exp is not None:
                seen = state.total > 0
                sums = np.log(state.total, out=np.zeros_like(state.total), where=seen)
                log_sum_exp[:] = np.where(seen, state.peak + sums, -SCORE_LIMIT).T
            if page_mass is not None and self._mass is not None:
                for run, (sums, peak) in enumerate(self._mass):
                    shares = sums * (np.exp(peak - state.peak) * inverse)[None]
                    page_mass[run * RUN_PAGES :][: len(sums)] = shares.mean(axis=(1, 2))
            self._n_pages = -1

    def _use(self) -> _Use:
        return _Use(self._lock)

    def _empty(self) -> _State:
        shape = self._q.shape[:2]
        return _State(np.full(shape, -SCORE_LIMIT, np.float32), np.zeros(shape, np.float32), np.zeros_like(self._q))

    def _attend_run(self, refs: Refs) -> None:
        spec = self._spec
        n, page_size = len(refs), spec.page_size
        keys = np.zeros((spec.n_kv_heads, n, page_size, spec.head_dim), np.float32)
        values = np.zeros_like(keys)
        live = np.zeros((n, page_size), bool)
        for index, ref in enumerate(refs):
            live[index] = live_slots(ref, page_size)
            if live[index].any():
                k, v = decode_page(ref, spec)
                # A dead slot may hold anything, even NaN: it must not reach a product.
                keys[:, index], values[:, index] = (np.where(live[index][:, None], x, 0) for x in (k, v))
        flat = (spec.n_kv_heads, n * page_size, spec.head_dim)
        visible = np.broadcast_to(live.ravel(), (self._q.shape[1], n * page_size))
        if self._window:
            slots = (refs["position"][:, None] + np.arange(page_size)).ravel()
            visible = visible & (self._positions[:, None] - slots[None, :] < self._window)
        partial, weights = self._attend(keys.reshape(flat), values.reshape(flat), visible)
        if self._mass is not None:
            sums = weights.reshape(*weights.shape[:2], n, page_size).sum(axis=3).transpose(2, 0, 1)
            self._mass.append((sums, partial.peak))
        self._state.merge(partial)

    def _attend(self, keys: Float, values: Float, visible: Bools) -> tuple[_State, Float]:
        """Attend to keys and values [n_kv_heads, n, head_dim]; visible is [T, n]."""
        n_kv_heads, n_new, head_dim = len(keys), self._q.shape[1], self._spec.head_dim
        grouped = self._q.reshape(n_kv_heads, -1, head_dim)
        with np.errstate(over="ignore", invalid="ignore"):
            scores = (grouped @ keys.transpose(0, 2, 1)).reshape(self._n_q_heads, n_new, -1)
            if self._softcap:
                scores = self._softcap * np.tanh(scores / self._softcap)
        scores = np.clip(np.nan_to_num(scores, nan=0.0), -SCORE_LIMIT, SCORE_LIMIT)
        peak = np.max(scores, axis=2, initial=-SCORE_LIMIT, where=visible)
        weights = np.where(visible, np.exp(np.minimum(scores - peak[..., None], 0)), np.float32(0))
        acc = (weights.reshape(n_kv_heads, -1, weights.shape[2]) @ values).reshape(self._q.shape)
        return _State(peak, weights.sum(axis=2), acc), weights


class _Use:
    """One call at a time."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this Attention is in use by another thread")

    def __exit__(self, *_: object) -> None:
        self._lock.release()
