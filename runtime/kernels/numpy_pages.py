"""Page kernels in NumPy: writing, quantising, decoding and bounding pages, and the checks that they share.

The twins of the native functions of the same names; :mod:`edgekv.runtime.kernels.numpy_attention` offers them.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from edgekv import codec
from edgekv.spec import RECORD_CHECKED_FROM, RECORD_HEAD_BYTES, RECORD_HEADER_BYTES, PageSpec

from .interface import KIND_HOT, KIND_WARM, PAGE_REF, Addresses, Bytes, Float, Half, Int64, Refs

HALF_LIMIT = np.float32(65504)
#: From here on a number is rounded to infinity, not to the limit.
HALF_END = np.float32(65520)

Bools = NDArray[np.bool_]


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
    check_array("sources", sources, np.uint64, (len(sources),))
    check_array("targets", targets, np.uint64, (len(sources),))
    check_array("n_slots", n_slots, np.int64, (len(sources),))
    if np.any(n_slots < 0):
        raise ValueError("n_slots must not be negative")
    for source, target, slots in zip(sources.tolist(), targets.tolist(), n_slots.tolist(), strict=True):
        pack_warm(source, target, n_kv_heads, head_dim, page_size, slots)


def write_hot(page: Bytes | int, slot: int, k: Float, v: Float, page_size: int) -> bool:
    """Write tokens into a HOT page from ``slot`` on, saturating at the largest fp16; say whether none was beyond it."""
    n, n_kv_heads, head_dim = _tokens(k, v)
    spec = PageSpec(1, n_kv_heads, head_dim, page_size)
    if slot < 0 or n > page_size - slot:
        raise ValueError("the tokens do not fit into the page")
    to = _page_bytes(page, "page", spec.hot_bytes, writable=True)[: spec.hot_bytes].view(np.float16)
    keys = to[: spec.elements].reshape(n_kv_heads, head_dim, page_size)
    values = to[spec.elements :].reshape(n_kv_heads, page_size, head_dim)
    keys[:, :, slot : slot + n] = np.clip(k, -HALF_LIMIT, HALF_LIMIT).transpose(1, 2, 0)
    values[:, slot : slot + n] = np.clip(v, -HALF_LIMIT, HALF_LIMIT).transpose(1, 0, 2)
    return not any((np.abs(x) >= HALF_END).any() for x in (k, v))


def page_bounds(refs: Refs, low: Half, high: Half, page_size: int) -> None:
    """Smallest and largest decoded key over the live slots, rounded outwards; zeros where none is live."""
    check_refs(refs)
    spec = PageSpec(1, low.shape[1], low.shape[2], page_size)
    check_array("low", low, np.float16, (len(refs), spec.n_kv_heads, spec.head_dim), writable=True)
    check_array("high", high, np.float16, low.shape, writable=True)
    for index, ref in enumerate(refs):
        live = live_slots(ref, page_size)
        if not live.any():
            low[index] = high[index] = 0
            continue
        keys = decode_page(ref, spec)[0][:, live]
        low[index] = -_half_up(-keys.min(axis=1))
        high[index] = _half_up(keys.max(axis=1))


def read_seconds(pool: Any, array: Bytes) -> float:
    """Seconds to merely read ``array``."""
    check_array("array", array, np.uint8, (len(array),))
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


def checksums(rows: Bytes, start: int, stop: int, out: Addresses) -> None:
    """XXH3-64 of bytes [start, stop) of each row; see :class:`edgekv.runtime.kernels.Kernels`."""
    if start < 0 or stop > rows.shape[1] or stop - start <= 240:
        raise ValueError("start and stop must name more than 240 bytes of a row")
    check_array("out", out, np.uint64, (len(rows),), writable=True)
    for index, row in enumerate(rows):
        out[index] = xxhash.xxh3_64_intdigest(row[start:stop].data)


class RecordReader:
    """Reads records when it is asked to: beside NumPy's attention, reading takes no time that would be worth hiding.

    See :class:`edgekv.runtime.kernels.interface.RecordReads`.
    """

    how = "caller"

    def __init__(self, depth: int, how: str = "") -> None:
        if how not in ("", self.how):
            raise ValueError(f"this system does not read rows with {how!r}")
        self._done: dict[int, bytes | OSError] = {}
        self._next = 0

    def submit(self, file: int, places: Int64, rows: Bytes, heads: Bytes, payload_bytes: int) -> int:
        """Read."""
        self._next += 1
        try:
            self._done[self._next] = _read_rows(file, places, rows, heads, payload_bytes)
        except OSError as error:
            self._done[self._next] = error
        return self._next

    def wait(self, ticket: int, pool: object = None) -> bytes:
        """Say what came of a request."""
        done = self._done.pop(ticket)
        if isinstance(done, OSError):
            raise done
        return done


def _read_rows(file: int, places: Int64, rows: Bytes, heads: Bytes, payload_bytes: int) -> bytes:
    good = np.zeros(len(rows), np.uint8)
    sums = np.empty(1, np.uint64)
    for index, row in enumerate(rows):
        if os.preadv(file, [row.data], int(places[index]) * row.size) == row.size:
            checksums(row[None], RECORD_CHECKED_FROM, RECORD_HEADER_BYTES + payload_bytes, sums)
            expected = heads[index].copy()
            expected[8:RECORD_CHECKED_FROM] = sums.view(np.uint8)
            good[index] = np.array_equal(row[:RECORD_HEAD_BYTES], expected)
    return good.tobytes()


def decode_page(ref: np.void, spec: PageSpec) -> tuple[Float, Float]:
    """Return keys and values of a page, both [n_kv_heads, page_size, head_dim] float32; dead slots may hold anything."""
    unpack = codec.unpack_hot if ref["kind"] == KIND_HOT else codec.unpack_warm
    with np.errstate(invalid="ignore", over="ignore"):  # of bytes in dead slots
        return unpack(_ref_bytes(ref, spec), spec.n_kv_heads, spec.head_dim, spec.page_size)


def _ref_bytes(ref: np.void, spec: PageSpec) -> Bytes:
    size = spec.hot_bytes if ref["kind"] == KIND_HOT else spec.warm_bytes
    return _page_bytes(int(ref["data"]), "data", size)


def live_slots(ref: np.void, page_size: int) -> Bools:
    """Return [page_size] bool: which slots hold a live token."""
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
    check_array("k", k, np.float32, k.shape)
    check_array("v", v, np.float32, k.shape)
    n, n_kv_heads, head_dim = k.shape
    return n, n_kv_heads, head_dim


def check_array(name: str, array: NDArray[Any], dtype: Any, shape: tuple[int, ...], *, writable: bool = False) -> None:
    """Raise ValueError unless an array has this dtype and shape and is contiguous (and writable)."""
    if array.dtype != dtype:
        raise ValueError(f"{name} must be {np.dtype(dtype).name}, not {array.dtype.name}")
    if not array.flags.c_contiguous or (writable and not array.flags.writeable):
        raise ValueError(f"{name} must be a C-contiguous {'writable ' if writable else ''}array")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(array.shape)}")


def check_refs(refs: Refs) -> None:
    """Raise ValueError unless ``refs`` is a contiguous row of page references."""
    if refs.dtype != PAGE_REF or refs.ndim != 1 or not refs.flags.c_contiguous:
        raise ValueError("refs must be a C-contiguous 1-D PAGE_REF array")
    bad = np.flatnonzero((refs["data"] % np.uint64(2) != 0) | (refs["kind"] > KIND_WARM))
    if bad.size:
        raise ValueError(f"refs[{bad[0]}] has an odd address or an unknown kind")
