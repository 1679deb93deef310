"""The kernels in NumPy: what runs where the native extension is missing. Same names, same meaning, slow.

As in the native kernels, pages are attended in fixed runs of RUN_PAGES and the runs' softmax states are merged in
logical order, so that a result does not depend on how a step is cut into pieces.
"""

from __future__ import annotations

import ctypes
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv import codec
from edgekv.runtime.kernels import KIND_HOT, KIND_WARM, PAGE_REF, Addresses, Bytes, Float, Half, Int8, Int64, Refs
from edgekv.spec import PageSpec

RUN_PAGES = 8
#: Scores are clamped to this, so that a masked score stays below every real one without an infinity.
SCORE_LIMIT = np.float32(1e30)
HALF_LIMIT = np.float32(65504)

Bools = NDArray[np.bool_]


def isa() -> str:
    """Name of the instruction set in use."""
    return "numpy"


def available_isas() -> tuple[str, ...]:
    """Names of the instruction sets to choose from."""
    return ("numpy",)


@dataclass(frozen=True)
class ThreadPool:
    """Stands for the native pool; NumPy's own threads do the work."""

    n_threads: int

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
            _check("sinks", sinks, np.float32, (n_q_heads,))
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
        _check_refs(refs)
        _check("out", out, np.float32, (len(q), self._n_q_heads, self._spec.head_dim), writable=True)
        if page_mass is not None:
            _check("page_mass", page_mass, np.float32, (len(refs),), writable=True)
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
        _check("q", q, np.float32, (n_new, self._n_q_heads, spec.head_dim))
        _check("new_k", new_k, np.float32, (n_new, spec.n_kv_heads, spec.head_dim))
        _check("new_v", new_v, np.float32, (n_new, spec.n_kv_heads, spec.head_dim))
        _check("positions", positions, np.int64, (n_new,))
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
        _check_refs(refs)
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
        _check("out", out, np.float32, (n_new, self._n_q_heads, self._spec.head_dim), writable=True)
        if page_mass is not None:
            if self._mass is None:
                raise ValueError("page_mass was not asked for in begin()")
            _check("page_mass", page_mass, np.float32, (self._n_pages,), writable=True)
        if log_sum_exp is not None:
            _check("log_sum_exp", log_sum_exp, np.float32, (n_new, self._n_q_heads), writable=True)
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
            live[index] = _live(ref, page_size)
            if live[index].any():
                k, v = _decode(ref, spec)
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


def pack_warm(
    hot_page: Bytes | int, out: Bytes | int, n_kv_heads: int, head_dim: int, page_size: int, n_slots: int = -1
) -> None:
    """Quantise a HOT page; slots from ``n_slots`` on count as zero (-1: none)."""
    spec = PageSpec(1, n_kv_heads, head_dim, page_size)
    if not -1 <= n_slots <= page_size:
        raise ValueError(f"n_slots must be 0..{page_size}, not {n_slots}")
    live = np.arange(page_size) < (page_size if n_slots == -1 else n_slots)
    source = _page_bytes(hot_page, "hot_page", spec.hot_bytes)
    _pack(source, _page_bytes(out, "out", spec.warm_bytes, writable=True), spec, live)


def pack_warm_many(
    pool: Any,
    sources: Addresses,
    targets: Addresses,
    n_slots: Int64,
    n_kv_heads: int,
    head_dim: int,
    page_size: int,
) -> None:
    """:func:`pack_warm` for many pages, by address."""
    _check("sources", sources, np.uint64, (len(sources),))
    _check("targets", targets, np.uint64, (len(sources),))
    _check("n_slots", n_slots, np.int64, (len(sources),))
    if np.any(n_slots < 0):
        raise ValueError("n_slots must not be negative")
    for source, target, slots in zip(sources.tolist(), targets.tolist(), n_slots.tolist(), strict=True):
        pack_warm(source, target, n_kv_heads, head_dim, page_size, slots)


def write_hot(page: Bytes | int, slot: int, k: Float, v: Float, page_size: int) -> None:
    """Write tokens into a HOT page from ``slot`` on, saturating at the largest fp16."""
    n, n_kv_heads, head_dim = _tokens(k, v)
    spec = PageSpec(1, n_kv_heads, head_dim, page_size)
    if slot < 0 or n > page_size - slot:
        raise ValueError("the tokens do not fit into the page")
    to = _page_bytes(page, "page", spec.hot_bytes, writable=True)[: spec.hot_bytes].view(np.float16)
    keys = to[: spec.elements].reshape(n_kv_heads, head_dim, page_size)
    values = to[spec.elements :].reshape(n_kv_heads, page_size, head_dim)
    keys[:, :, slot : slot + n] = np.clip(k, -HALF_LIMIT, HALF_LIMIT).transpose(1, 2, 0)
    values[:, slot : slot + n] = np.clip(v, -HALF_LIMIT, HALF_LIMIT).transpose(1, 0, 2)


def write_hot_many(pages: Addresses, slot: int, k: Float, v: Float, page_size: int) -> None:
    """:func:`write_hot` across pages: the first from ``slot`` on, the next ones from their start."""
    _check("pages", pages, np.uint64, (len(pages),))
    n = _tokens(k, v)[0]
    if not 0 <= slot < page_size or slot + n > len(pages) * page_size:
        raise ValueError("the tokens do not fit into the pages")
    done = 0
    for page in pages.tolist():
        if done == n:
            break
        stop = min(n, done + page_size - slot)
        write_hot(page, slot, k[done:stop], v[done:stop], page_size)
        done, slot = stop, 0


def gather_int8(pool: Any, refs: Refs, keys: Int8, key_scales: Half, values: Int8, value_scales: Half) -> None:
    """Copy pages to plain INT8 arrays, quantising HOT ones; dead slots become zeros."""
    _check_refs(refs)
    n_kv_heads, page_size, head_dim = keys.shape[1:]
    spec = PageSpec(1, n_kv_heads, head_dim, page_size)
    _check("keys", keys, np.int8, (len(refs), n_kv_heads, page_size, head_dim), writable=True)
    _check("values", values, np.int8, keys.shape, writable=True)
    _check("key_scales", key_scales, np.float16, (len(refs), n_kv_heads, head_dim), writable=True)
    _check("value_scales", value_scales, np.float16, (len(refs), n_kv_heads, page_size), writable=True)
    packed = np.empty(spec.warm_bytes, np.uint8)
    for index, ref in enumerate(refs):
        live = _live(ref, page_size)
        if not live.any():
            for array in (keys, key_scales, values, value_scales):
                array[index] = 0
            continue
        page = _ref_bytes(ref, spec)
        if ref["kind"] == KIND_HOT:
            _pack(page, packed, spec, live)
            page = packed
        k, k_scales, v, v_scales = codec.unpack_warm_codes(page, n_kv_heads, head_dim, page_size)
        keys[index] = np.where(live[:, None], k, 0)
        values[index] = np.where(live[:, None], v, 0)
        key_scales[index], value_scales[index] = k_scales, np.where(live, v_scales, np.float16(0))


def page_bounds(refs: Refs, low: Half, high: Half, page_size: int) -> None:
    """Smallest and largest decoded key over the live slots, rounded outwards; zeros where none is live."""
    _check_refs(refs)
    spec = PageSpec(1, low.shape[1], low.shape[2], page_size)
    _check("low", low, np.float16, (len(refs), spec.n_kv_heads, spec.head_dim), writable=True)
    _check("high", high, np.float16, low.shape, writable=True)
    for index, ref in enumerate(refs):
        live = _live(ref, page_size)
        if not live.any():
            low[index] = high[index] = 0
            continue
        keys = _decode(ref, spec)[0][:, live]
        low[index] = -_half_up(-keys.min(axis=1))
        high[index] = _half_up(keys.max(axis=1))


def read_bandwidth(pool: Any, array: Bytes) -> float:
    """Seconds to merely read ``array``."""
    _check("array", array, np.uint8, (len(array),))
    start = time.perf_counter()
    array[: len(array) // 8 * 8].view(np.uint64).sum()
    return time.perf_counter() - start


def _half_up(x: Float) -> Half:
    with np.errstate(over="ignore"):
        nearest = x.astype(np.float16)
        above = np.nextafter(nearest, np.float16(np.inf))
    return np.where(nearest.astype(np.float32) < x, above, nearest)


def _pack(hot: Bytes, out: Bytes, spec: PageSpec, live: Bools) -> None:
    keys, values = codec.unpack_hot(hot, spec.n_kv_heads, spec.head_dim, spec.page_size)
    plain = [np.where(live[:, None], x, 0).transpose(1, 0, 2) for x in (keys, values)]
    codec.pack_warm(np.ascontiguousarray(plain[0]), np.ascontiguousarray(plain[1]), out)


def _decode(ref: np.void, spec: PageSpec) -> tuple[Float, Float]:
    unpack = codec.unpack_hot if ref["kind"] == KIND_HOT else codec.unpack_warm
    with np.errstate(invalid="ignore", over="ignore"):  # of bytes in dead slots
        return unpack(_ref_bytes(ref, spec), spec.n_kv_heads, spec.head_dim, spec.page_size)


def _ref_bytes(ref: np.void, spec: PageSpec) -> Bytes:
    size = spec.hot_bytes if ref["kind"] == KIND_HOT else spec.warm_bytes
    return _page_bytes(int(ref["data"]), "data", size)


def _live(ref: np.void, page_size: int) -> Bools:
    if not ref["data"]:
        return np.zeros(page_size, bool)
    words = np.ascontiguousarray(ref["mask"]).astype("<u8")
    mask = np.unpackbits(words.view(np.uint8), bitorder="little")[:page_size].astype(bool)
    live: Bools = mask & (np.arange(page_size) < int(ref["n_slots"]))
    return live


def _page_bytes(page: Bytes | int, name: str, size: int, *, writable: bool = False) -> Bytes:
    if isinstance(page, int):
        if not page or page % 2:
            raise ValueError(f"{name} must be an even address, not {page}")
        return np.frombuffer((ctypes.c_uint8 * size).from_address(page), np.uint8)
    if not page.flags.c_contiguous or (writable and not page.flags.writeable):
        raise ValueError(f"{name} must be an address or a contiguous {'writable ' if writable else ''}array")
    if page.nbytes < size:
        raise ValueError(f"{name} has {page.nbytes} bytes, a page {size}")
    return page.reshape(-1).view(np.uint8)


def _tokens(k: Float, v: Float) -> tuple[int, int, int]:
    if k.ndim != 3:
        raise ValueError("k must have shape [n, n_kv_heads, head_dim]")
    _check("k", k, np.float32, k.shape)
    _check("v", v, np.float32, k.shape)
    n, n_kv_heads, head_dim = k.shape
    return n, n_kv_heads, head_dim


def _check(name: str, array: NDArray[Any], dtype: Any, shape: tuple[int, ...], *, writable: bool = False) -> None:
    if array.dtype != dtype:
        raise ValueError(f"{name} must be {np.dtype(dtype).name}, not {array.dtype.name}")
    if not array.flags.c_contiguous or (writable and not array.flags.writeable):
        raise ValueError(f"{name} must be a C-contiguous {'writable ' if writable else ''}array")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(array.shape)}")


def _check_refs(refs: Refs) -> None:
    if refs.dtype != PAGE_REF or refs.ndim != 1 or not refs.flags.c_contiguous:
        raise ValueError("refs must be a C-contiguous 1-D PAGE_REF array")
    bad = np.flatnonzero((refs["data"] % np.uint64(2) != 0) | (refs["kind"] > KIND_WARM))
    if bad.size:
        raise ValueError(f"refs[{bad[0]}] has an odd address or an unknown kind")
