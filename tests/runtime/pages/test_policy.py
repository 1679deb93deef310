"""Who goes first: what each policy promises, and that dropping is never done unasked, nor hidden."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekv.bundle import read_manifest
from edgekv.errors import BudgetError, UsageError
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.pages.manager import PageManager
from edgekv.runtime.pages.policy import PINNED_PAGES, PageUse, Policy, make_policy
from edgekv.tiers import KVMode, Tier

Bundle = Callable[..., Path]
TOKENS: list[int] = np.random.default_rng(3).integers(2, 1000, 700).tolist()
NAMES = ("lru", "heavy", "window", "random")


def use(pages: list[int], last_used: list[int], mass: list[float]) -> PageUse:
    layer = np.zeros(len(pages), np.int64)
    return PageUse(layer, np.array(pages), np.array(last_used), np.array(mass, np.float32))


def first_to_last(policy: Policy, pages: PageUse) -> list[int]:
    order: list[int] = pages.page[policy.order(pages)].tolist()
    return order


def test_each_policy_orders_by_what_its_name_says() -> None:
    pages = use([0, 1, 2, 3, 4], [9, 3, 7, 3, 8], [0.5, 4.0, 0.1, 2.0, 0.9])
    assert first_to_last(make_policy("lru"), pages) == [1, 3, 2, 4, 0]
    assert first_to_last(make_policy("heavy"), pages) == [2, 0, 4, 3, 1]
    assert first_to_last(make_policy("window"), pages) == [1, 2, 3, 4, 0], "oldest first, the sinks last"


def test_random_knows_no_pattern_and_repeats() -> None:
    pages = use(list(range(200)), [0] * 200, [0.0] * 200)
    order = first_to_last(make_policy("random"), pages)
    assert order == first_to_last(make_policy("random"), pages)
    assert sorted(order) == list(range(200))
    assert abs(np.corrcoef(order, np.arange(200))[0, 1]) < 0.2


def test_an_unknown_policy_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="policy must be one of lru, heavy, window, random, not 'fifo'"):
        make_policy("fifo")


def run(bundle: Bundle, **options: Any) -> tuple[list[int], Generator]:
    generator = Generator.open(bundle("demo"), RunOptions(kv=KVMode.INT8, threads=2, context=800, **options))
    return list(generator.tokens(TOKENS, max_tokens=20)), generator


@pytest.mark.parametrize("policy", NAMES)
def test_no_policy_changes_the_text_unless_dropping_is_allowed(policy: str, bundle: Bundle) -> None:
    expected, roomy = run(bundle)
    said, generator = run(bundle, policy=policy, kv_budget="22%")
    with roomy, generator:
        assert said == expected
        counters = generator.report().pages
        assert counters is not None
        assert (counters.pages_dropped, counters.pages_missed) == (0, 0)
        assert counters.pages_offloaded > 0


@pytest.mark.parametrize("policy", NAMES)
def test_what_is_dropped_is_counted_and_each_later_need_of_it_too(policy: str, bundle: Bundle) -> None:
    said, generator = run(bundle, policy=policy, kv_budget="22%", allow_drop=True)
    with generator:
        counters, cache = generator.report().pages, generator.cache
        assert counters is not None
        assert cache is not None
        dropped = cache.table.tier == Tier.DROPPED
        assert counters.pages_dropped == np.count_nonzero(dropped) > 50
        assert len(said) > 1
        assert counters.pages_missed >= (len(said) - 1) * 50, "exact attention needs every page at every step"
        assert not dropped[:, 0].any(), "the sinks stay"
        sealed = int(cache.table.n_slots[0]) // cache.spec.page_size
        assert not dropped[:, sealed - 2 :].any(), "the recent pages stay"
        if policy == "window":
            for layer in dropped:
                gone = np.flatnonzero(layer)
                assert gone.tolist() == list(range(1, len(gone) + 1)), "the oldest went, without a gap"


@pytest.mark.parametrize("kv", list(KVMode))
@pytest.mark.parametrize("policy", NAMES)
def test_dropping_goes_on_in_the_least_budget_and_a_smaller_one_is_refused_at_the_start(
    policy: str, kv: KVMode, bundle: Bundle
) -> None:
    manifest = read_manifest(bundle("demo"))
    least = PageManager.least_bytes(manifest.model.pages(manifest.page_size), PINNED_PAGES)
    options = RunOptions(kv=kv, policy=policy, allow_drop=True, context=400, threads=2)
    with Generator.open(bundle("demo"), replace(options, kv_budget=least)) as generator:
        assert len(list(generator.tokens(TOKENS[:380], max_tokens=5))) == 5
        counters = generator.report().pages
        assert counters is not None
        assert counters.pages_dropped > 0
    with (
        Generator.open(bundle("demo"), replace(options, kv_budget=least - 1)) as generator,
        pytest.raises(BudgetError, match="3 that are never dropped"),
    ):
        generator.prefill(TOKENS[:380], max_tokens=5)


def test_pages_that_carry_attention_outlive_random_ones_under_heavy(bundle: Bundle) -> None:
    """Measured on the model's own attention: what heavy keeps had more of it than what it dropped."""
    _, generator = run(bundle, policy="heavy", kv_budget="22%", allow_drop=True)
    with generator:
        assert generator.cache is not None
        table = generator.cache.table
        kept = (table.tier <= Tier.WARM) & table.sealed()
        mass_kept, mass_gone = table.mass[kept][1:], table.mass[table.tier == Tier.DROPPED]
        assert np.median(mass_kept) > np.median(mass_gone)


def test_the_command_says_what_was_dropped_and_how_often_it_was_needed(bundle: Bundle, tmp_path: Path) -> None:
    text = tmp_path / "prompt.txt"
    text.write_text("It was a dark night. " * 120, encoding="utf-8")
    command = [sys.executable, "-m", "edgekv", "run", str(bundle("demo")), "--prompt-file", str(text), "--kv", "int8"]
    command += ["--kv-budget", "22%", "--max-tokens", "8", "--allow-drop"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pages were dropped, and needed" in " ".join(done.stderr.split())
    facts = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert facts["pages"]["pages_missed"] > facts["pages"]["pages_dropped"] > 0
