"""The attention kernels against the seam, for every instruction set of this processor and for NumPy."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv import codec, seam
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.kernels.interface import KIND_HOT, KIND_WARM, PAGE_REF, Kernels
from edgekv.spec import PageSpec
from tests.cases import seldom

NUMPY = load_kernels("numpy")
try:
    NATIVE: Kernels | None = load_kernels("native")
except ImportError:
    NATIVE = None
ISAS = [*(NATIVE.available_isas() if NATIVE else ()), "numpy"]
needs_native = pytest.mark.skipif(NATIVE is None, reason="the native extension is not built")
quick = settings(max_examples=25, deadline=None)


def kernels_of(isa: str) -> Kernels:
    """The kernels that offer an instruction set."""
    if isa == "numpy":
        return NUMPY
    assert NATIVE is not None
    return NATIVE


def garbage(rng: np.random.Generator, n: int) -> Any:
    """Bytes that read as fp16 are NaN, infinite or huge."""
    return rng.choice(np.array([0x7E00, 0x7C00, 0xFC00, 0xFE01, 0x7BFF], np.uint16), n).view(np.uint8)


@dataclass
class Case:
    """Random pages, new tokens, and what the seam makes of them."""

    n_kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    page_size: int = 32
    n_pages: int = 9
    n_new: int = 1
    window: int = 0
    softcap: float = 0.0
    with_sinks: bool = False
    kinds: tuple[int, ...] = (KIND_HOT, KIND_WARM)
    magnitude: float = 1.0
    fill: str = "mixed"  # "full": every slot of every page is live
    seed: int = 0
    store: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = self.rng = np.random.default_rng(self.seed)
        self.spec = PageSpec(1, self.n_kv_heads, self.head_dim, self.page_size)
        self.refs = np.zeros(self.n_pages, PAGE_REF)
        self.views: list[seam.PageView] = []
        for index in range(self.n_pages):
            self._add_page(index)
        heads = self.n_kv_heads * self.group
        self.q = self._normal(self.n_new, heads) * 3
        self.k, self.v = self._normal(self.n_new, self.n_kv_heads), self._normal(self.n_new, self.n_kv_heads)
        self.positions = np.arange(self.n_new) * 2 + self.n_pages * self.page_size
        self.sinks = rng.standard_normal(heads, np.float32) if self.with_sinks else None
        self.scale = self.head_dim**-0.5

    def _normal(self, *shape: int) -> Any:
        return self.rng.standard_normal((*shape, self.head_dim), np.float32) * np.float32(self.magnitude)

    def _add_page(self, index: int) -> None:
        rng, spec, page_size = self.rng, self.spec, self.page_size
        kind = int(rng.choice(self.kinds))
        choice = "full" if self.fill == "full" else rng.choice(["full", "part", "pruned", "holes", "empty", "absent"])
        n_slots = int(rng.integers(0, page_size + 1)) if choice == "part" else page_size
        live = np.arange(page_size) < n_slots
        if choice == "empty":
            n_slots, live = 0, np.zeros(page_size, bool)
        if choice == "pruned":
            live = np.zeros(page_size, bool)
        if choice == "holes":
            live = rng.random(page_size) < 0.7
        page = np.empty(spec.hot_bytes + 64, np.uint8)[: spec.hot_bytes]
        page[:] = 0
        k, v = self._normal(page_size, spec.n_kv_heads), self._normal(page_size, spec.n_kv_heads)
        NUMPY.write_hot(page, 0, k, v, page_size)
        if kind == KIND_WARM:
            warm = np.zeros(spec.warm_bytes, np.uint8)
            NUMPY.pack_warm(page, warm, spec.n_kv_heads, spec.head_dim, page_size, n_slots)
            page = warm
        unpack = codec.unpack_warm if kind == KIND_WARM else codec.unpack_hot
        keys, values = unpack(page, spec.n_kv_heads, spec.head_dim, page_size)
        bits = np.zeros(128, bool)
        # A set bit beyond the written slots must not count either.
        bits[:page_size] = live | (np.arange(page_size) >= n_slots)
        self.refs[index] = (
            0 if choice == "absent" else page.ctypes.data,
            np.packbits(bits, bitorder="little").view(np.uint64),
            index * page_size,
            n_slots,
            kind,
        )
        if choice == "absent":
            live = np.zeros(page_size, bool)
        self.store.append(page)
        self.views.append(seam.PageView(keys, values, live, np.arange(page_size) + index * page_size))

    def live(self, index: int) -> Any:
        return self.views[index].mask

    def spoil_dead_slots(self) -> None:
        """Overwrite what belongs to no live token."""
        spec = self.spec
        for index, page in enumerate(self.store):
            dead = ~self.live(index)
            if self.refs["kind"][index] == KIND_HOT:
                keys = page[: 2 * spec.elements].view(np.uint16).reshape(spec.n_kv_heads, spec.head_dim, -1)
                values = page[2 * spec.elements :].view(np.uint16).reshape(spec.n_kv_heads, self.page_size, -1)
                spoiled = garbage(self.rng, keys.size).view(np.uint16)
                keys[:, :, dead] = spoiled.reshape(keys.shape)[:, :, dead]
                values[:, dead] = spoiled.reshape(values.shape)[:, dead]
            else:
                n = spec.elements
                keys = page[:n].reshape(spec.n_kv_heads, spec.head_dim // 4, self.page_size, 4)
                values = page[n : 2 * n].reshape(spec.n_kv_heads, self.page_size // 4, spec.head_dim, 4)
                scales = page[2 * n :].view(np.uint16)[spec.n_kv_heads * spec.head_dim :]
                keys[:, :, dead] = 0x80
                for slot in np.flatnonzero(dead):
                    values[:, slot // 4, :, slot % 4] = 0x7F
                slots = scales.reshape(spec.n_kv_heads, self.page_size)
                slots[:, dead] = garbage(self.rng, slots.size).view(np.uint16).reshape(slots.shape)[:, dead]

    def attention(self, isa: str, threads: int = 2) -> Any:
        kernels = kernels_of(isa)
        return kernels.Attention(
            kernels.ThreadPool(threads),
            self.n_kv_heads * self.group,
            self.n_kv_heads,
            self.head_dim,
            self.page_size,
            self.scale,
            self.softcap,
            self.sinks,
            512,
            isa,
        )

    def result(self, isa: str, threads: int = 2, cuts: list[int] | None = None, refs: Any = None) -> tuple[Any, Any]:
        """Output and page mass, in one piece or cut at the given multiples of RUN_PAGES."""
        attention = self.attention(isa, threads)
        refs = self.refs if refs is None else refs
        out, mass = np.full_like(self.q, np.nan), np.full(self.n_pages, np.nan, np.float32)
        if cuts is None:
            attention.run(self.q, self.k, self.v, self.positions, refs, out, self.window, mass)
        else:
            attention.begin(self.q, self.k, self.v, self.positions, self.window, self.n_pages, True)
            edges = [0, *cuts, self.n_pages]
            for start, stop in pairwise(edges):
                attention.pages(refs, start, stop)
            attention.finish(out, mass)
        return out, mass

    def expected(self) -> tuple[Any, Any]:
        return seam.paged_attention(
            self.q,
            self.k,
            self.v,
            self.views,
            self.positions,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
        )

    def check(self, isa: str) -> None:
        out, mass = self.result(isa)
        want, want_mass = self.expected()
        # Integer products carry 16-bit operands: about 1e-4 of the largest value.
        np.testing.assert_allclose(out, want, atol=1e-3, rtol=0)
        np.testing.assert_allclose(mass, want_mass, atol=1e-4, rtol=1e-3)


cases = st.builds(
    Case,
    n_kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([32, 36, 64, 80, 128, 256]),
    page_size=st.sampled_from([16, 20, 32, 48, 64, 128]),
    n_pages=st.integers(0, 18),
    n_new=st.one_of(st.just(1), st.integers(1, 64)),
    window=st.sampled_from([0, 0, 1, 37, 200]),
    softcap=st.sampled_from([0.0, 0.0, 5.0, 50.0]),
    with_sinks=st.booleans(),
    kinds=st.sampled_from([(0,), (1,), (0, 1)]),
    seed=st.integers(0, 2**32 - 1),
)


@pytest.mark.parametrize("isa", ISAS)
@quick
@given(case=cases)
def test_any_shape_agrees_with_the_seam(isa: str, case: Case) -> None:
    case.spoil_dead_slots()
    case.check(isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [0, 150])
def test_a_large_chunk_agrees_with_the_seam(isa: str, window: int) -> None:
    Case(n_new=300, n_pages=40, window=window, head_dim=32, seed=5).check(isa)


@pytest.mark.parametrize("isa", ISAS)
def test_a_decode_step_with_many_pages_agrees_with_the_seam(isa: str) -> None:
    Case(n_kv_heads=8, n_pages=300, seed=6).check(isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n_new", [1, 5, 40])
def test_bytes_in_dead_slots_change_no_bit(isa: str, n_new: int) -> None:
    case = Case(n_new=n_new, n_pages=24, seed=7)
    before = case.result(isa)
    case.spoil_dead_slots()
    after = case.result(isa)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n_new", seldom([1, 3, 50], but=[3]))
@quick
@given(data=st.data())
def test_cuts_threads_and_addresses_change_no_bit(isa: str, n_new: int, data: st.DataObject) -> None:
    case = Case(n_new=n_new, n_pages=data.draw(st.integers(0, 45)), seed=data.draw(st.integers(0, 99)), head_dim=32)
    out, mass = case.result(isa, threads=1)
    runs = case.n_pages // 8
    cuts = sorted(8 * cut for cut in data.draw(st.sets(st.integers(0, runs))))
    moved = case.refs.copy()
    copies = []
    for index, page in enumerate(case.store):
        room = np.full(page.size + 200, 0xFF, np.uint8)
        offset = 2 * data.draw(st.integers(0, 60))
        room[offset : offset + page.size] = page
        copies.append(room)
        if moved["data"][index]:
            moved["data"][index] = room.ctypes.data + offset
    threads = data.draw(st.integers(1, 5))
    out2, mass2 = case.result(isa, threads, cuts, moved)
    np.testing.assert_array_equal(out, out2)
    np.testing.assert_array_equal(mass, mass2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n_new", [1, 40])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_the_largest_magnitudes_give_finite_averages(isa: str, n_new: int, softcap: float) -> None:
    case = Case(magnitude=3e4, n_new=n_new, softcap=softcap, n_pages=10, seed=8)
    out, mass = case.result(isa)
    assert np.isfinite(out).all()
    assert np.isfinite(mass).all()
    values = [view.values[:, view.mask] for view in case.views if view.mask.any()]
    largest = max(np.abs(case.v).max(), *(np.abs(v).max() for v in values))
    assert np.abs(out).max() <= largest * 1.001
    case.q = case.q * np.float32(1e30)  # scores overflow fp32
    assert np.isfinite(case.result(isa)[0]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n_new", [1, 30])
def test_page_mass_and_the_new_tokens_share_one(isa: str, n_new: int) -> None:
    case = Case(n_new=n_new, n_pages=20, fill="full", seed=9)
    case.k *= np.float32(1e-6)
    case.q *= np.float32(1e-6)  # every visible token weighs the same
    seen = case.n_pages * case.page_size + np.arange(n_new) + 1
    np.testing.assert_allclose(case.result(isa)[1].sum(), (case.n_pages * case.page_size / seen).mean(), rtol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n_new", [1, 50])
def test_quantised_and_fp16_pages_agree_within_the_quantisation(isa: str, n_new: int) -> None:
    hot = Case(kinds=(KIND_HOT,), fill="full", n_new=n_new, seed=10).result(isa)[0]
    warm = Case(kinds=(KIND_WARM,), fill="full", n_new=n_new, seed=10).result(isa)[0]
    assert 0 < np.abs(hot - warm).max() < 0.05


@pytest.mark.parametrize("isa", ISAS)
def test_an_attention_object_serves_steps_of_changing_size(isa: str) -> None:
    sizes = [Case(n_new=n, n_pages=p, seed=11) for n, p in ((1, 30), (60, 3), (1, 0), (7, 9), (1, 30))]
    attention = sizes[0].attention(isa)
    for case in sizes:
        out = np.empty_like(case.q)
        attention.run(case.q, case.k, case.v, case.positions, case.refs, out)
        np.testing.assert_array_equal(out, case.result(isa)[0])
    held = attention.buffer_bytes
    case = sizes[-1]
    attention.run(case.q, case.k, case.v, case.positions, case.refs, np.empty_like(case.q))
    assert attention.buffer_bytes == held


@pytest.mark.parametrize("isa", ISAS)
def test_an_abandoned_step_leaves_no_trace(isa: str) -> None:
    case = Case(n_pages=16, seed=12)
    attention = case.attention(isa)
    attention.begin(case.q, case.k, case.v, case.positions, 0, 16)
    attention.pages(case.refs, 0, 8)
    out = np.empty_like(case.q)
    attention.run(case.q, case.k, case.v, case.positions, case.refs, out)
    np.testing.assert_array_equal(out, case.result(isa)[0])


def _bad_calls(case: Case) -> dict[str, dict[str, Any]]:
    return {
        "q must be float32": {"q": case.q.astype(np.float64)},
        "q must be a C-contiguous": {"q": np.asfortranarray(np.repeat(case.q, 2, axis=0))[::2]},
        "new_k must have shape": {"new_k": case.k[:, :, :-4].copy()},
        "new_v must have shape": {"new_v": np.repeat(case.v, 2, axis=0)},
        "positions must be int64": {"positions": case.positions.astype(np.int32)},
        "out must have shape": {"out": np.empty((1, 1, 1), np.float32)},
        "page_mass must have shape": {"page_mass": np.empty(1, np.float32)},
        "refs must be": {"refs": np.zeros(3, np.uint64)},
        "odd address": {"refs": np.array([(1, 0, 0, 1, 0)], PAGE_REF), "page_mass": None},
        "unknown kind": {"refs": np.array([(2, 0, 0, 0, 7)], PAGE_REF), "page_mass": None},
        "window must not": {"window": -1},
    }


@pytest.mark.parametrize("isa", [ISAS[0], "numpy"])
@pytest.mark.parametrize("message", sorted(_bad_calls(Case())))
def test_a_wrong_argument_is_named(isa: str, message: str) -> None:
    case = Case()
    arguments: dict[str, Any] = {
        "q": case.q,
        "new_k": case.k,
        "new_v": case.v,
        "positions": case.positions,
        "refs": case.refs,
        "out": np.empty_like(case.q),
        "window": 0,
        "page_mass": np.empty(case.n_pages, np.float32),
    }
    with pytest.raises(ValueError, match=message):
        case.attention(isa).run(**(arguments | _bad_calls(case)[message]))
    out, _ = case.result(isa)  # and the next call works
    np.testing.assert_allclose(out, case.expected()[0], atol=1e-3)


@pytest.mark.parametrize("isa", [ISAS[0], "numpy"])
def test_too_many_tokens_and_falling_positions_are_refused(isa: str) -> None:
    case = Case(n_new=3)
    out = np.empty_like(case.q)
    with pytest.raises(ValueError, match="positions must increase"):
        case.attention(isa).run(case.q, case.k, case.v, case.positions[::-1].copy(), case.refs, out)
    case = Case(n_new=513)
    with pytest.raises(ValueError, match=r"q must have 1\.\.512 tokens"):
        case.attention(isa).run(case.q, case.k, case.v, case.positions, case.refs, np.empty_like(case.q))


@pytest.mark.parametrize("isa", [ISAS[0], "numpy"])
def test_pieces_out_of_order_are_refused(isa: str) -> None:
    case = Case(n_pages=20)
    attention = case.attention(isa)
    out = np.empty_like(case.q)
    with pytest.raises(ValueError, match=r"before begin\(\)"):
        attention.pages(case.refs, 0, 8)
    attention.begin(case.q, case.k, case.v, case.positions, 0, 20)
    with pytest.raises(ValueError, match="where the last piece stopped"):
        attention.pages(case.refs, 8, 16)
    with pytest.raises(ValueError, match="multiple of RUN_PAGES"):
        attention.pages(case.refs, 0, 9)
    with pytest.raises(ValueError, match="before the last page"):
        attention.finish(out)
    attention.pages(case.refs, 0, 20)
    with pytest.raises(ValueError, match="not asked for"):
        attention.finish(out, np.empty(20, np.float32))
    attention.finish(out)
    np.testing.assert_array_equal(out, case.result(isa)[0])
