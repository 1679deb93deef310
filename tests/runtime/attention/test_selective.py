"""Selective attention: what it leaves out is never more than it certifies, and the same wherever pages are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv import seam
from edgekv.errors import UsageError
from edgekv.runtime.attention.select import Selector
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.kernels.interface import Kernels
from edgekv.runtime.pages.bounds import Summaries
from edgekv.runtime.pages.cache import KVCache
from edgekv.runtime.pages.policy import CacheOptions
from edgekv.runtime.stats import RunStats
from edgekv.settings import AttendOptions, parse_attend
from edgekv.spec import PageSpec
from edgekv.tiers import KVMode, Tier
from tests.cases import seldom

Bundle = Callable[..., Path]


def prompt(count: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(2, 1000, count).tolist()
    return tokens


def generate(folder: Path, tokens: list[int], count: int, **options: Any) -> tuple[list[int], RunStats]:
    with Generator.open(folder, RunOptions(threads=2, kv=KVMode.INT8, **options)) as generator:
        result = list(generator.tokens(tokens, max_tokens=count))
        assert generator.cache is not None
        generator.cache.check()
        return result, generator.report()


class Layer:
    """One layer's cache with random keys whose scale and drift vary, and one query per head."""

    def __init__(self, seed: int, spec: PageSpec, group: int, n_tokens: int, spread: float, kernels: Kernels) -> None:
        rng = np.random.default_rng(seed)
        self.kernels, self.spec, self.scale, self.softcap = kernels, spec, spec.head_dim**-0.5, 0.0
        options = CacheOptions(budget_bytes=(n_tokens // spec.page_size + 4) * spec.frame_bytes)
        self.cache = KVCache(spec, options, kernels)
        shape = (n_tokens, spec.n_kv_heads, spec.head_dim)
        drift = np.cumsum(rng.normal(size=shape).astype(np.float32), axis=0) * np.float32(0.1)
        keys = (rng.normal(size=shape).astype(np.float32) + drift) * np.float32(spread)
        keys[:, :, 0] *= np.linspace(0.1, 4.0, n_tokens, dtype=np.float32)[:, None]  # scales must grow
        self.cache.append(0, keys, rng.normal(size=shape).astype(np.float32), np.arange(n_tokens))
        heads = spec.n_kv_heads * group
        self.q = (rng.normal(size=(1, heads, spec.head_dim)) * spread).astype(np.float32)
        self.new = rng.normal(size=(2, 1, spec.n_kv_heads, spec.head_dim)).astype(np.float32)
        self.positions = np.array([n_tokens])

    def selector(self, **options: Any) -> Selector:
        summaries = Summaries(self.cache.table, self.kernels)
        return Selector(
            self.cache.table,
            summaries,
            AttendOptions(True, **options),
            scale=self.scale,
            softcap=self.softcap,
            capacity=2,
            recent=1,
        )

    def attend(self, taken: Any, window: int) -> np.ndarray[Any, Any]:
        """Attend to the pages taken and return the logarithm of the summed exponentials per head."""
        refs = self.cache.table.refs[0, : len(taken)].copy()
        refs["data"][~taken] = 0
        heads = self.q.shape[1]
        shape = (heads, self.spec.n_kv_heads, self.spec.head_dim, self.spec.page_size)
        attention = self.kernels.Attention(self.kernels.ThreadPool(1), *shape, self.scale, softcap=self.softcap)
        out, sums = np.empty_like(self.q), np.empty((1, heads), np.float32)
        attention.run(self.q, self.new[0], self.new[1], self.positions, refs, out, window, None, sums)
        result: np.ndarray[Any, Any] = sums[0]
        return result

    def true_missing(self, taken: Any, window: int) -> np.ndarray[Any, Any]:
        """Return the mass per head that full attention gives to the pages not taken."""
        n_slots = int(self.cache.table.n_slots[0])
        held = self.cache.table.tokens[0, :n_slots]
        live = held >= 0
        keys, values = self.cache.read(0, held[live])
        page_of = np.flatnonzero(live) // self.spec.page_size
        heads = self.q.shape[1]
        missing = np.zeros(heads)
        for head in range(heads):
            kv = head // (heads // self.spec.n_kv_heads)
            pages = []
            for page in range(len(taken)):
                inside = page_of == page
                pages.append(
                    seam.PageView(
                        keys[inside, kv][None],
                        values[inside, kv][None],
                        np.ones(inside.sum(), bool),
                        held[live][inside],
                    )
                )
            mass = seam.paged_attention(
                self.q[:, head : head + 1], self.new[0][:, kv : kv + 1], self.new[1][:, kv : kv + 1], pages,
                self.positions, scale=self.scale, softcap=self.softcap, window=window,
            )[1]  # fmt: skip
            missing[head] = mass[~taken].sum()
        return missing


@pytest.mark.parametrize("kind", seldom(["native", "numpy"], but=["native"]))
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_no_head_misses_more_mass_than_is_certified(kind: str, data: st.DataObject) -> None:
    if kind == "native":
        pytest.importorskip("edgekv.runtime._kernels")
    kernels = load_kernels("numpy" if kind == "numpy" else "native")
    head_dim = data.draw(st.sampled_from([16, 64, 80]))
    spec = PageSpec(1, data.draw(st.integers(1, 3)), head_dim, data.draw(st.sampled_from([16, 32])))
    n_tokens = data.draw(st.integers(3 * spec.page_size, 14 * spec.page_size))
    spread = data.draw(st.sampled_from([0.01, 0.3, 1.0, 3.0]))
    layer = Layer(data.draw(st.integers(0, 1 << 30)), spec, data.draw(st.integers(1, 3)), n_tokens, spread, kernels)
    layer.softcap = data.draw(st.sampled_from([0.0, 0.0, 3.0]))
    if data.draw(st.booleans()):
        gone = np.random.default_rng(1).choice(n_tokens, n_tokens // 2, replace=False)
        layer.cache.prune(np.sort(gone))
    window = data.draw(st.sampled_from([0, 0, 40, 100]))
    limit = {"pages": data.draw(st.integers(1, 6))} if data.draw(st.booleans()) else {"epsilon": 0.05}
    selector = layer.selector(**limit)
    choice = selector.choose(0, layer.q[0], n_tokens, window)
    sums = layer.attend(choice.taken, window)
    further = selector.extend(0, choice, sums)
    if further is not None:
        choice, sums = further, layer.attend(further.taken, window)
    certified, true = selector.missing(choice, sums), layer.true_missing(choice.taken, window)
    assert (certified >= true - 1e-6).all()
    if "epsilon" in limit:
        assert certified.max() <= 0.05
    free = layer.cache.table.tier[0, : len(choice.taken)] == Tier.FREE
    assert choice.taken[-1] or free[-1], "the open or last page"
    assert choice.taken[0] or free[0] or window, "the sinks"


@pytest.mark.slow
def test_what_is_chosen_does_not_depend_on_where_pages_are(bundle: Bundle) -> None:
    folder, tokens = bundle("demo"), prompt(900)
    roomy, stats = generate(folder, tokens, 24, attend="selective:20")
    assert stats.selection is not None
    assert stats.selection.hit_rate == 1.0
    for budget in ("24%", "35%"):
        for threads in (1, 2):
            with Generator.open(folder, RunOptions(threads=threads, kv_budget=budget, attend="selective:20")) as small:
                assert list(small.tokens(tokens, max_tokens=24)) == roomy, budget
                fetched = small.report().selection
                assert fetched is not None
                assert fetched.hit_rate < 1.0
                assert fetched.fetched_per_step > 0
                small.cache.check()  # type: ignore[union-attr]


@pytest.mark.parametrize("attend", seldom(["selective:1000", "selective:100%", "selective:0"], but=["selective:100%"]))
def test_a_limit_that_leaves_nothing_out_is_exact(attend: str, bundle: Bundle) -> None:
    folder, tokens = bundle("demo"), prompt(400)
    exact, _ = generate(folder, tokens, 16)
    chosen, stats = generate(folder, tokens, 16, attend=attend)
    assert chosen == exact
    assert stats.selection is None, "no step left a page out"


def test_epsilon_takes_what_it_needs_to_prove_it(bundle: Bundle) -> None:
    _, stats = generate(bundle("demo"), prompt(400), 12, attend="selective:0.3")
    assert stats.selection is not None
    assert stats.selection.missing_max.max <= 0.3


def test_by_default_as_many_pages_are_chosen_as_stay_in_ram(bundle: Bundle) -> None:
    _, stats = generate(bundle("demo"), prompt(900), 40, attend="selective", kv_budget="30%")
    assert stats.selection is not None
    assert stats.selection.wanted_per_step < stats.selection.pages_per_step
    assert stats.selection.hit_rate > 0.6, "the resident set follows what is chosen, even of random tokens"


@pytest.mark.slow
def test_the_resident_set_is_not_thrashed_by_more_than_fits(bundle: Bundle) -> None:
    _, stats = generate(bundle("demo"), prompt(900), 40, attend="selective:80%", kv_budget="30%")
    assert stats.selection is not None
    assert stats.selection.hit_rate > 0.25, "cyclic least-recently-used eviction would be near 0"


def test_summaries_are_part_of_the_budget(bundle: Bundle) -> None:
    with Generator.open(bundle("demo"), RunOptions(threads=1, kv_budget="30%", attend="selective")) as generator:
        list(generator.tokens(prompt(900), max_tokens=4))
        plan, cache = generator.budget, generator.cache
        assert plan is not None
        assert cache is not None
        assert cache.manager.summaries is not None
        kept = cache.manager.summaries.nbytes
        assert plan.arena_bytes + plan.staging_bytes <= plan.budget_bytes
        assert kept <= plan.staging_bytes


def test_a_dropped_page_counts_as_missing(bundle: Bundle) -> None:
    _, stats = generate(bundle("demo"), prompt(900), 12, attend="selective:50%", kv_budget="30%", allow_drop=True)
    assert stats.selection is not None
    assert stats.pages is not None
    assert stats.pages.pages_dropped > 0
    assert stats.selection.missing_max.max > 0.5


@pytest.mark.parametrize(
    "text", ["selectively", "exact:3", "selective:", "selective:-1", "selective:1.5", "selective:x%"]
)
def test_what_attend_does_not_understand_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="attend must be exact, selective"):
        parse_attend(text)


def test_the_inline_form_refuses_to_select(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="export with --form split"):
        Generator.open(bundle("demo", "inline"), RunOptions(attend="selective"))


def test_a_share_of_few_pages_leaves_some_to_choose_beside_those_that_are_always_taken() -> None:
    layer = Layer(0, PageSpec(1, 2, 16, 16), 2, 16 * 16, 1.0, load_kernels())
    selector = layer.selector(share=0.25)
    assert [selector.limit(n) for n in (8, 16, 28, 100)] == [7, 7, 7, 25]
    assert not selector.selects(7)
    assert selector.choose(0, layer.q[0], 16 * 16, 0).taken.sum() == 7
