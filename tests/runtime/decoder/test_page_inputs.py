"""The inputs of the inline graph that are kept from step to step are those that would be made anew, whatever happens between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.codec import unpack_hot, unpack_warm
from edgekv.contract import inline_spec
from edgekv.runtime.decoder.page_inputs import LayerInputs
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.pages.cache import KVCache
from edgekv.runtime.pages.policy import CacheOptions
from edgekv.spec import ModelSpec, PageSpec, RopeSpec
from edgekv.tiers import Tier

HEADS, DIM, PAGE, LAYERS = 2, 8, 16, 2
SPEC = PageSpec(LAYERS, HEADS, DIM, PAGE)
MODEL = ModelSpec("", LAYERS, 1, HEADS, HEADS, DIM, 1, 1, 1, RopeSpec((0.0,)), 1.0, (0, 40))
CONTRACT = inline_spec(MODEL, PAGE)

step = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 50)),
    st.tuples(st.just("prune"), st.integers(0, 200)),
    st.tuples(st.just("truncate"), st.integers(0, 200)),
    st.tuples(st.just("compress"), st.integers(1, 3)),
)


def make_cache(*, seal: bool, windows: tuple[int, ...] = (0, 0)) -> KVCache:
    options = CacheOptions(
        budget_bytes=200 * SPEC.frame_bytes, compress_at_seal=seal, windows=windows, forget_unseen=True
    )
    return KVCache(SPEC, options, load_kernels())


def append(cache: KVCache, tokens: np.ndarray[Any, Any], rng: np.random.Generator) -> None:
    cache.begin_step()
    for layer in range(LAYERS):
        keys, values = rng.standard_normal((2, len(tokens), HEADS, DIM)).astype(np.float32)
        cache.append(layer, keys, values, tokens)


def check(cache: KVCache, inputs: LayerInputs, layer: int) -> None:
    """Hold the inputs against the pages in the arena."""
    feeds: dict[str, Any] = {}
    packed, _ = inputs.bring_up_to_date(feeds)
    table, manager = cache.table, cache.manager
    first = int(table.first_seen()[layer])
    pages = np.arange(first, table.n_pages(layer))
    assert packed.tolist() == pages[table.tier[layer, pages] == Tier.WARM].tolist()
    given = {name.partition(".")[0]: value for name, value in feeds.items()}
    assert all(value.flags.c_contiguous for value in feeds.values())
    for row, page in enumerate(packed.tolist()):
        content = manager.arena.page(int(table.offset[layer, page]), SPEC.warm_bytes)
        keys, values = unpack_warm(content, HEADS, DIM, PAGE)
        decoded = given["key_pages"][row].astype(np.float32) * given["key_scales"][row].astype(np.float32)[:, :, None]
        np.testing.assert_array_equal(decoded.swapaxes(1, 2), keys)
        scales = given["value_scales"][row].astype(np.float32)[:, :, None]
        np.testing.assert_array_equal(given["value_pages"][row].astype(np.float32) * scales, values)
    hot = pages[table.tier[layer, pages] == Tier.HOT]
    for row, page in enumerate(hot.tolist()):
        keys, values = unpack_hot(manager.arena.page(int(table.offset[layer, page]), SPEC.hot_bytes), HEADS, DIM, PAGE)
        span = slice(row * PAGE, (row + 1) * PAGE)
        np.testing.assert_array_equal(given["recent_keys"][span].astype(np.float32), keys.swapaxes(0, 1))
        np.testing.assert_array_equal(given["recent_values"][span].astype(np.float32), values.swapaxes(0, 1))
    held = table.tokens[layer].reshape(-1, PAGE)
    np.testing.assert_array_equal(given["page_positions"], held[packed])
    np.testing.assert_array_equal(given["recent_positions"], held[hot].reshape(-1))


@pytest.mark.parametrize("windows", [(0, 0), (0, 40)])
@settings(max_examples=60, deadline=None)
@given(st.booleans(), st.lists(step, min_size=1, max_size=14))
def test_what_is_kept_is_what_would_be_made_anew(
    windows: tuple[int, ...], seal: bool, steps: list[tuple[str, int]]
) -> None:
    cache, rng = make_cache(seal=seal, windows=windows), np.random.default_rng(0)
    inputs = [LayerInputs(cache, layer, CONTRACT) for layer in range(LAYERS)]
    for kind, amount in steps:
        length = int(cache.table.n_slots.max())
        if kind == "append":
            append(cache, np.arange(length, length + amount), rng)
        elif kind == "prune":
            held = [token for token in range(amount, amount + 12) if cache.table.holds(0, np.array([token])).all()]
            cache.prune(np.array(held, np.int64))
        elif kind == "truncate":
            cache.truncate(amount)
        else:
            cache.manager.compress(amount)
        for layer in range(LAYERS):
            check(cache, inputs[layer], layer)


def test_a_page_that_did_not_change_is_not_copied_again(tmp_path: Path) -> None:
    cache, rng = make_cache(seal=True), np.random.default_rng(0)
    inputs = LayerInputs(cache, 0, CONTRACT)
    append(cache, np.arange(70), rng)
    feeds: dict[str, Any] = {}
    inputs.bring_up_to_date(feeds)
    cache.manager.arena.page(int(cache.table.offset[0, 1]), SPEC.warm_bytes)[:] = 0  # behind everybody's back
    before = feeds["key_pages.0"].copy()
    append(cache, np.arange(70, 90), rng)
    inputs.bring_up_to_date(feeds)
    assert len(feeds["key_pages.0"]) == 5
    np.testing.assert_array_equal(feeds["key_pages.0"][:4], before)
