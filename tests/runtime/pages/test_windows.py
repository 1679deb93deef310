"""Layers with a sliding window: pages that no token to come sees are gone, and nothing else changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.device_profiles import load
from edgekv.errors import TokenDropped
from edgekv.plan import Workload, make_plan, read_model
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.pages.bounds import summary_bytes
from edgekv.runtime.pages.budget import held_pages
from edgekv.runtime.pages.cache import KVCache
from edgekv.runtime.pages.policy import SPARE_PAGES, CacheOptions
from edgekv.runtime.sessions import restore
from edgekv.spec import PageSpec
from edgekv.tiers import KVMode, Tier
from tests.cases import seldom
from tests.checkpoints import make_checkpoint

PROMPT = np.random.default_rng(0).integers(3, 250, 650).tolist()
WINDOW, PAGE, LAYERS = 64, 32, 3


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory, bundle: Callable[..., Path]) -> Callable[..., Path]:
    """Return what gives a bundle, in a form, of a model whose layers all have a window."""

    @functools.cache
    def source(window: int) -> Path:
        return make_checkpoint(tmp_path_factory.mktemp("windowed"), "mistral", std=0.04, sliding_window=window)

    return lambda form, window=WINDOW: bundle(source(window), form=form, page_size=PAGE)


def answer(folder: Path, prompt: list[int] = PROMPT, count: int = 12, **options: Any) -> tuple[list[int], Generator]:
    generator = Generator.open(folder, RunOptions(context=720, threads=2, prefixes=False, **options))
    return list(generator.tokens(prompt, max_tokens=count)), generator


def held(generator: Generator) -> int:
    assert generator.cache is not None
    tier = generator.cache.table.tier
    return int(np.count_nonzero(tier != Tier.FREE))


@pytest.mark.parametrize("form", ["split", "inline"])
@pytest.mark.parametrize("kv", list(KVMode))
def test_pages_that_no_token_can_see_are_not_held(windowed: Callable[..., Path], form: str, kv: KVMode) -> None:
    needed = LAYERS * (WINDOW // PAGE + 1)
    said, generator = answer(windowed(form), kv=kv)
    with generator:
        assert held(generator) <= needed + LAYERS * SPARE_PAGES
        assert generator.cache is not None
        generator.cache.check()
        use = generator.report().cache
        assert use is not None
        assert use.tokens == len(PROMPT) + len(said) - 1
        with pytest.raises(TokenDropped, match="token 5 lies behind the window"):
            generator.cache.read(0, np.array([5]))


def test_a_budget_that_holds_the_windows_holds_any_text(windowed: Callable[..., Path]) -> None:
    expected, roomy = answer(windowed("split"), kv=KVMode.INT8)
    spec = roomy.manifest.model.pages(PAGE)
    frames = held_pages(spec, (WINDOW,) * LAYERS, 720, 256) // 2 + LAYERS + 2
    said, generator = answer(windowed("split"), kv_budget=frames * spec.frame_bytes)
    with roomy, generator:
        assert said == expected
        assert generator.budget is not None
        assert generator.budget.fits
        assert generator.report().bytes_written == 0
    workload = Workload(720, 650, kv_budget=frames * spec.frame_bytes, kv=KVMode.AUTO)
    plan = make_plan(read_model(windowed("split")), load("raspberry-pi-5-8gb"), workload)
    assert plan.resident
    assert plan.largest_exact == 1024
    assert sum(plan.tokens_by_tier.values()) < 200


@pytest.mark.parametrize("session", [False, True])
@pytest.mark.parametrize("attend", ["exact", "selective:25%"])
@pytest.mark.parametrize("window", [WINDOW, 320])
def test_only_what_a_token_sees_is_read_from_flash(
    windowed: Callable[..., Path], window: int, attend: str, session: bool, tmp_path: Path
) -> None:
    """The least budget: it holds the small window, and of the large one hardly anything."""
    folder = windowed("split", window)
    expected, roomy = answer(folder, kv=KVMode.INT8, attend=attend)
    kept = SessionOptions(tmp_path / "session") if session else None
    spec = roomy.manifest.model.pages(PAGE)
    budget = (LAYERS + 3) * spec.frame_bytes + 3 * load_kernels().RUN_PAGES * spec.record_bytes
    if attend != "exact":
        budget += summary_bytes(spec, 720 // PAGE + 1)
    said, generator = answer(folder, kv=KVMode.INT8, kv_budget=budget, attend=attend, session=kept)
    with roomy, generator:
        assert said == expected
        counters, steps = generator.report().pages, 20
        assert counters is not None
        before = counters.pages_fetched
        for _ in range(steps):
            generator.step([7])
        fetched = counters.pages_fetched - before
        assert (
            (0 if window == WINDOW else 1)
            <= fetched
            <= (steps if window == WINDOW else steps * LAYERS * (window // PAGE + 1))
        )


@pytest.mark.parametrize("session", [False, True])
@pytest.mark.parametrize("budget", [None, 260 * 1024])
@pytest.mark.parametrize("cut", seldom([1, 20, 40, 100, 500, 640], but=[1, 40, 500]))
def test_a_sequence_that_is_cut_back_goes_on_as_if_it_had_never_been_longer(
    windowed: Callable[..., Path], cut: int, budget: int | None, session: bool, tmp_path: Path
) -> None:
    other = [*PROMPT[: len(PROMPT) - cut], 251, 252]
    # Steps of a page: a sequence is cut back to where a step began.
    expected, fresh = answer(windowed("split"), other, kv=KVMode.INT8, prefill_chunk=PAGE)
    kept = SessionOptions(tmp_path / "session") if session else None
    _, generator = answer(windowed("split"), kv=KVMode.INT8, kv_budget=budget, session=kept, prefill_chunk=PAGE)
    with fresh, generator:
        before = generator.stats.prefill_tokens
        assert list(generator.tokens(other, max_tokens=12)) == expected
        assert generator.cache is not None
        generator.cache.check()
        if session or cut <= PAGE - 12:  # a session has every page; without one a cut of less than a page needs none
            assert generator.stats.prefill_tokens - before <= cut + 2 + 2 * PAGE
    if session:
        again, resumed = answer(windowed("split"), PROMPT[:100], kv=KVMode.INT8, session=kept, prefill_chunk=PAGE)
        alone, plain = answer(windowed("split"), PROMPT[:100], kv=KVMode.INT8, prefill_chunk=PAGE)
        with resumed, plain:
            assert again == alone


@pytest.mark.parametrize("batch_bytes", [1, 4 * 1024 * 1024])
def test_a_resumed_session_reads_only_what_its_next_token_sees(
    windowed: Callable[..., Path], batch_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, whole = answer(windowed("split"), kv=KVMode.INT8)
    kept = SessionOptions(tmp_path / "session")
    answer(windowed("split"), count=4, session=kept)[1].close()
    monkeypatch.setattr(restore, "_BATCH_BYTES", batch_bytes)
    said, resumed = answer(windowed("split"), session=kept)
    with whole, resumed:
        assert said == expected
        assert resumed.cache is not None
        resumed.cache.check()
        store = resumed.cache.manager.store
        assert store is not None
        assert store.counters.records_read <= LAYERS * (WINDOW // PAGE + 2)


def test_a_step_that_fails_half_way_leaves_the_sequence_as_it_was(
    windowed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, whole = answer(windowed("split"), kv=KVMode.INT8)
    _, generator = answer(windowed("split"), PROMPT, 1, kv=KVMode.INT8)
    with whole, generator:
        append = KVCache.append

        def failing(self: KVCache, layer: int, *rest: Any) -> None:
            if layer == 1:
                raise RuntimeError("interrupted")
            append(self, layer, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(KVCache, "append", failing)
            with pytest.raises(RuntimeError, match="interrupted"):
                generator.step([5, 6, 7])
        assert generator.cache is not None
        generator.cache.check()
        assert list(generator.tokens(PROMPT, max_tokens=12)) == expected


steps = st.lists(
    st.one_of(
        st.integers(1, 70).map(lambda count: ("add", count)), st.integers(0, 200).map(lambda back: ("cut", back))
    ),
    min_size=1,
    max_size=12,
)


@given(
    windows=st.lists(st.sampled_from([0, 1, 7, 24, 64]), min_size=1, max_size=3),
    page=st.sampled_from([4, 16]),
    steps=steps,
)
@settings(max_examples=100, deadline=None)
def test_whatever_comes_and_goes_the_next_token_finds_what_it_sees(
    windows: list[int], page: int, steps: list[tuple[str, int]]
) -> None:
    spec = PageSpec(len(windows), 1, 4, page)
    options = CacheOptions(2**20, windows=tuple(windows), forget_unseen=True)
    cache = KVCache(spec, options, load_kernels())
    length = 0
    for what, count in steps:
        if what == "cut":
            kept = cache.truncate(max(length - count, 0))
            assert kept in (0, *range(max(length - count - page + 1, 0), length - count + 1))
            length = kept
        else:
            cache.begin_step()
            positions = np.arange(length, length + count)
            content = (positions % 100).astype(np.float32)[:, None, None] * np.ones((1, 1, 4), np.float32)
            for layer in range(spec.n_layers):
                cache.append(layer, content, content, positions)
            length += count
            assert np.count_nonzero(cache.table.tier != Tier.FREE) <= held_pages(spec, tuple(windows), length, count)
        cache.check()
        for layer, window in enumerate(windows):
            seen = np.arange(max(length - window + 1, 0) if window else 0, length)
            if seen.size:
                keys, _ = cache.read(layer, seen)
                assert np.allclose(keys[:, 0, 0], seen % 100, atol=0.5)
