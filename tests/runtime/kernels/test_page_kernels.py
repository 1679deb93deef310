"""The page kernels against the codec, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv import codec
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.kernels.interface import KIND_HOT, KIND_WARM, PAGE_REF, Kernels
from edgekv.spec import PageSpec

NUMPY = load_kernels("numpy")
try:
    ALL = [load_kernels("native"), NUMPY]
except ImportError:
    ALL = [NUMPY]
both = pytest.mark.parametrize("kernels", ALL, ids=lambda kernels: "numpy" if kernels is NUMPY else "native")
quick = settings(max_examples=40, deadline=None)

specs = st.builds(
    PageSpec,
    n_layers=st.just(1),
    n_kv_heads=st.integers(1, 4),
    head_dim=st.sampled_from([4, 32, 36, 64, 128, 256]),
    page_size=st.sampled_from([4, 16, 20, 32, 64, 128]),
)


def hot_page(spec: PageSpec, seed: int) -> Any:
    """A page of fp16 values of all magnitudes: zeros, subnormals, ordinary ones, the largest."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(2 * spec.elements, np.float32)
    x *= rng.choice(np.array([0, 1e-7, 1e-5, 1e-2, 1, 1, 1, 100], np.float32), x.size)
    if seed % 3 == 0:
        x[rng.integers(0, x.size, 5)] = 65504 * rng.choice([-1, 1], 5)
    return x.astype(np.float16).view(np.uint8)


def packed_by_codec(spec: PageSpec, page: Any, n_slots: int) -> Any:
    keys, values = codec.unpack_hot(page, spec.n_kv_heads, spec.head_dim, spec.page_size)
    live = np.arange(spec.page_size)[:, None, None] < n_slots
    out = np.zeros(spec.warm_bytes, np.uint8)
    keys, values = (np.where(live, x.transpose(1, 0, 2), np.float32(0)) for x in (keys, values))
    codec.pack_warm(keys, values, out)
    return out


def one_ref(page: Any, kind: int, live: Any, n_slots: int) -> Any:
    bits = np.zeros(128, bool)
    bits[: live.size] = live
    words = np.packbits(bits, bitorder="little").view(np.uint64)
    return np.array([(page.ctypes.data, words, 0, n_slots, kind)], PAGE_REF)


@both
@quick
@given(spec=specs, seed=st.integers(0, 2**32 - 1), data=st.data())
def test_packing_is_bit_identical_to_the_codec(
    kernels: Kernels, spec: PageSpec, seed: int, data: st.DataObject
) -> None:
    n_slots = data.draw(st.integers(0, spec.page_size))
    page = hot_page(spec, seed)
    want = packed_by_codec(spec, page, n_slots)
    values = page.view(np.float16)[spec.elements :].reshape(spec.n_kv_heads, spec.page_size, -1)
    keys = page.view(np.float16)[: spec.elements].reshape(spec.n_kv_heads, spec.head_dim, -1)
    values[:, n_slots:] = np.nan  # never written
    keys[:, :, n_slots:] = np.inf
    out = np.full(spec.warm_bytes, 0xAA, np.uint8)
    kernels.pack_warm(page, out, spec.n_kv_heads, spec.head_dim, spec.page_size, n_slots)
    np.testing.assert_array_equal(out, want)


@both
def test_many_pages_are_packed_by_address(kernels: Kernels) -> None:
    spec = PageSpec(1, 2, 64, 32)
    pages = [hot_page(spec, seed) for seed in range(7)]
    outs = [np.zeros(spec.warm_bytes, np.uint8) for _ in pages]
    slots = np.array([32, 0, 5, 32, 31, 1, 32])
    sources, targets = (np.array([x.ctypes.data for x in xs], np.uint64) for xs in (pages, outs))
    kernels.pack_warm_many(kernels.ThreadPool(2), sources, targets, slots, 2, 64, 32)
    for page, out, n_slots in zip(pages, outs, slots, strict=True):
        np.testing.assert_array_equal(out, packed_by_codec(spec, page, n_slots))


@both
@quick
@given(spec=specs, seed=st.integers(0, 2**32 - 1), data=st.data())
def test_tokens_are_written_where_the_layout_says(
    kernels: Kernels, spec: PageSpec, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    slot = data.draw(st.integers(0, spec.page_size - 1))
    n = data.draw(st.integers(0, spec.page_size - slot))
    k, v = (rng.standard_normal((n, spec.n_kv_heads, spec.head_dim), np.float32) * 40000 for _ in range(2))
    page = np.full(spec.hot_bytes, 0x11, np.uint8)
    in_range = kernels.write_hot(page.ctypes.data if seed % 2 else page, slot, k, v, spec.page_size)
    with np.errstate(over="ignore"):
        assert in_range == all(np.isfinite(x.astype(np.float16)).all() for x in (k, v))
    keys, values = codec.unpack_hot(page, spec.n_kv_heads, spec.head_dim, spec.page_size)
    inside = slice(slot, slot + n)
    for written, given_ in ((keys, k), (values, v)):
        want = np.clip(given_, -65504, 65504).astype(np.float16).transpose(1, 0, 2)
        np.testing.assert_array_equal(written[:, inside], want)
        untouched = np.full(2, 0x11, np.uint8).view(np.float16)[0]
        assert (np.delete(written, np.arange(slot, slot + n), axis=1) == untouched).all()


@both
@quick
@given(spec=specs, seed=st.integers(0, 2**32 - 1), kind=st.sampled_from([KIND_HOT, KIND_WARM]), data=st.data())
def test_bounds_enclose_the_live_keys_as_tightly_as_fp16_can(
    kernels: Kernels, spec: PageSpec, seed: int, kind: int, data: st.DataObject
) -> None:
    live = np.array(data.draw(st.lists(st.booleans(), min_size=spec.page_size, max_size=spec.page_size)))
    page = hot_page(spec, seed)
    if kind:
        page = packed_by_codec(spec, page, spec.page_size)
        keys, _ = codec.unpack_warm(page, spec.n_kv_heads, spec.head_dim, spec.page_size)
    else:
        keys, _ = codec.unpack_hot(page, spec.n_kv_heads, spec.head_dim, spec.page_size)
    low, high = (np.full((1, spec.n_kv_heads, spec.head_dim), 7, np.float16) for _ in range(2))
    kernels.page_bounds(one_ref(page, kind, live, spec.page_size), low, high, spec.page_size)
    if not live.any():
        assert not low.any()
        assert not high.any()
        return
    least, most = keys[:, live].min(axis=1), keys[:, live].max(axis=1)
    assert (low[0] <= least).all()
    assert (high[0] >= most).all()
    with np.errstate(over="ignore", under="ignore"):
        assert (np.nextafter(low[0], np.float16(np.inf)) > least).all()
        assert (np.nextafter(high[0], np.float16(-np.inf)) < most).all()


@both
def test_a_wrong_page_is_refused(kernels: Kernels) -> None:
    spec = PageSpec(1, 1, 32, 16)
    hot, warm = np.zeros(spec.hot_bytes, np.uint8), np.zeros(spec.warm_bytes, np.uint8)
    token = np.zeros((1, 1, 32), np.float32)
    with pytest.raises(ValueError, match="a page"):
        kernels.pack_warm(warm, warm, 1, 32, 16)
    with pytest.raises(ValueError, match="n_slots"):
        kernels.pack_warm(hot, warm, 1, 32, 16, 17)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.write_hot(hot, 16, token, token, 16)
    with pytest.raises(ValueError, match="address"):
        kernels.write_hot(0, 0, token, token, 16)
    with pytest.raises(ValueError, match="k must be float32"):
        kernels.write_hot(hot, 0, token.astype(np.float64), token, 16)  # type: ignore[arg-type]
    frozen = hot.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        kernels.write_hot(frozen, 0, token, token, 16)


@both
def test_reading_takes_time(kernels: Kernels) -> None:
    assert kernels.read_seconds(kernels.ThreadPool(2), np.zeros(1 << 20, np.uint8)) > 0


@pytest.mark.parametrize("size", [241, 256, 300, 1023, 1024, 1025, 1088, 4096, 34_352, 100_001])
@both
def test_checksums_are_those_of_the_xxhash_library(kernels: Kernels, size: int) -> None:
    rows = np.random.default_rng(size).integers(0, 256, (3, size + 21), np.uint8)
    sums = np.zeros(3, np.uint64)
    kernels.checksums(rows, 16, 16 + size, sums)
    assert sums.tolist() == [xxhash.xxh3_64_intdigest(row[16 : 16 + size].tobytes()) for row in rows]


@both
def test_a_row_too_short_for_the_checksum_is_refused(kernels: Kernels) -> None:
    with pytest.raises(ValueError, match="more than 240 bytes"):
        kernels.checksums(np.zeros((1, 300), np.uint8), 0, 240, np.zeros(1, np.uint64))
