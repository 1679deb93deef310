"""Pages that are mostly pruned are merged, so that memory comes back; what is left keeps its keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.errors import TokenPruned
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.memory_manager import MemoryManager
from edgekv.runtime.pages.merge import merge_groups
from edgekv.tiers import KVMode, Tier

Bundle = Callable[..., Path]
SHAPE = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 32}
COUNT = 16 * 40


@pytest.fixture
def manager() -> Iterator[MemoryManager]:
    with MemoryManager(4, memory_threshold_percent=100) as manager:
        manager.initialize_kv_cache(SHAPE)
        yield manager


def fill(manager: MemoryManager) -> tuple[np.ndarray, np.ndarray]:
    keys, values = np.random.default_rng(1).normal(0, 1, (2, COUNT, 2, 32)).astype(np.float32)
    manager.add_to_kv_cache(layer_idx=0, key=keys, value=values, token_indices=range(COUNT))
    return keys.astype(np.float16), values.astype(np.float16)


@given(st.lists(st.integers(1, 8), max_size=40))
@settings(max_examples=100, deadline=None)
def test_groups_fit_a_page_fill_more_than_half_of_it_and_share_nothing(live: list[int]) -> None:
    groups = merge_groups(list(range(len(live))), live, 16)
    members = [page for group in groups for page in group]
    assert len(members) == len(set(members))
    for group in groups:
        assert group == sorted(group)
        assert len(group) > 1
        assert 8 < sum(live[page] for page in group) <= 16


def test_fp16_pages_are_merged_without_any_change(manager: MemoryManager) -> None:
    keys, values = fill(manager)
    used = manager.cache.manager.arena.used_bytes
    left = list(range(0, COUNT, 5))
    manager.remove_pruned_tokens([token for token in range(COUNT) if token % 5])
    assert manager.get_stats()["pages_merged"] >= 20
    assert manager.cache.manager.arena.used_bytes <= used // 2
    got_keys, got_values = manager.get_from_kv_cache(layer_idx=0, token_indices=left)
    np.testing.assert_array_equal(got_keys, keys[left])
    np.testing.assert_array_equal(got_values, values[left])
    with pytest.raises(TokenPruned):
        manager.get_from_kv_cache(layer_idx=0, token_indices=[1])
    manager.cache.check()


def test_int8_pages_lose_at_most_half_a_step_more(manager: MemoryManager) -> None:
    fill(manager)
    manager.compress_pages(40)
    left = list(range(0, COUNT, 5))
    before = manager.get_from_kv_cache(layer_idx=0, token_indices=left)
    manager.remove_pruned_tokens([token for token in range(COUNT) if token % 5])
    assert manager.get_stats()["pages_merged"] >= 20
    after = manager.get_from_kv_cache(layer_idx=0, token_indices=left)
    # The scale of a key channel is at most that of its largest key anywhere, that of a value that of its token and head.
    steps = (np.abs(before[0]).max(axis=0, keepdims=True), np.abs(before[1]).max(axis=2, keepdims=True))
    for old, new, largest in zip(before, after, steps, strict=True):
        bound = largest * (0.5 / 127 * (1 + 2.0**-9) + 2.0**-10)
        assert (np.abs(new - old) <= bound).all()
    assert np.abs(after[0] - before[0]).max() > 0, "something was quantised again"
    manager.cache.check()


def test_a_cut_behind_a_merge_keeps_exactly_what_arrived_before_it(manager: MemoryManager) -> None:
    keys, _ = fill(manager)
    manager.remove_pruned_tokens([token for token in range(COUNT) if token % 5])
    kept = manager.cache.truncate(320)
    left = [token for token in range(0, COUNT, 5) if token < kept]
    got, _ = manager.get_from_kv_cache(layer_idx=0, token_indices=left)
    np.testing.assert_array_equal(got, keys[left])
    assert manager.cache.table.count(0) == len(left)
    manager.cache.check()
    more = np.ones((COUNT - kept, 2, 32), np.float32)
    manager.add_to_kv_cache(layer_idx=0, key=more, value=more, token_indices=range(kept, COUNT))
    got, _ = manager.get_from_kv_cache(layer_idx=0, token_indices=[*left, COUNT - 1])
    np.testing.assert_array_equal(got[:-1], keys[left])
    manager.cache.check()


def test_pages_on_flash_stay_there_and_pinned_ones_as_they_are(manager: MemoryManager) -> None:
    fill(manager)
    manager.compress_pages(40)
    manager.offload_pages(10)
    manager.remove_pruned_tokens([token for token in range(COUNT) if token % 5])
    table = manager.cache.table
    assert (table.tier[0] == Tier.COLD).sum() == 10
    np.testing.assert_array_equal(table.live(0, 0), [0, 5, 10, 15])
    assert (table.tier[0, 38:40] < Tier.COLD).all()


@pytest.mark.parametrize("attend", ["exact", "selective:50%"])
def test_a_model_attends_to_merged_pages_as_to_pruned_ones(attend: str, bundle: Bundle) -> None:
    """fp16 pages are copied, so only the order of additions differs."""
    tokens = np.random.default_rng(2).integers(2, 1000, 600).tolist()
    gone = np.array([token for token in range(32, 560) if token % 4])
    logits = []
    for merges in (False, True):
        with Generator.open(bundle("demo"), RunOptions(kv=KVMode.FP16, threads=2, attend=attend)) as generator:
            generator.prefill(tokens[:-1], max_tokens=8)
            cache = generator.cache
            assert cache is not None
            if not merges:
                cache.manager.options = replace(cache.manager.options, merge_layers=frozenset())
            used = cache.manager.arena.used_bytes
            cache.prune(gone)
            assert (cache.manager.arena.used_bytes < used // 2) == merges
            cache.check()
            logits.append(generator.step(tokens[-1:]).copy())
    if attend == "exact":
        np.testing.assert_allclose(logits[0], logits[1], atol=2e-3)
    else:
        assert np.isfinite(logits[1]).all()
