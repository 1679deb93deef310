"""A pinned span: reclaim offloads it last and never drops it, whatever policy says who goes first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edgekv.cli.main import app
from edgekv.errors import OutOfPages, UsageError
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.pages.cache import KVCache
from edgekv.tiers import KVMode, Tier

Bundle = Callable[..., Path]
TOKENS: list[int] = np.random.default_rng(7).integers(2, 1000, 700).tolist()
PINNED = 150  # ten pages of 16 tokens
TIGHT = RunOptions(threads=2, kv=KVMode.INT8, kv_budget="25%", context=900)


def tiers_after_a_long_answer(folder: Path, options: RunOptions, pin: int) -> np.ndarray:
    with Generator.open(folder, options) as generator:
        generator.prefill(TOKENS, max_tokens=100, pin=pin)
        for token in TOKENS[:100]:
            generator.step([token])
        assert generator.cache is not None
        generator.cache.check()
        tiers: np.ndarray = generator.cache.table.tier[:, :10].copy()
    return tiers


@pytest.mark.parametrize("policy", ["lru", "heavy", "window", "random"])
def test_pinned_pages_are_never_dropped(policy: str, bundle: Bundle) -> None:
    options = RunOptions(
        threads=2, kv=KVMode.INT8, kv_budget="25%", context=900, policy=policy, allow_drop=True, prefixes=False
    )
    assert (tiers_after_a_long_answer(bundle("demo"), options, 0) == Tier.DROPPED).any()
    assert (tiers_after_a_long_answer(bundle("demo"), options, PINNED) <= Tier.WARM).all()


def test_pinned_pages_go_to_flash_last(bundle: Bundle) -> None:
    assert (tiers_after_a_long_answer(bundle("demo"), TIGHT, 0) == Tier.COLD).any()
    assert (tiers_after_a_long_answer(bundle("demo"), TIGHT, PINNED) <= Tier.WARM).all()


def test_a_pin_that_does_not_fit_is_an_error_and_no_page_of_it_is_dropped(bundle: Bundle) -> None:
    options = RunOptions(threads=2, kv=KVMode.INT8, kv_budget="20%", context=900, allow_drop=True, prefixes=False)
    with Generator.open(bundle("demo"), options) as generator:
        with pytest.raises(OutOfPages, match="pin"):
            generator.prefill(TOKENS, max_tokens=100, pin=len(TOKENS))
        cache = generator.cache
        assert isinstance(cache, KVCache)
        assert not (cache.table.tier == Tier.DROPPED).any()


def test_the_next_prompt_decides_anew_what_is_pinned(bundle: Bundle) -> None:
    with Generator.open(bundle("demo"), TIGHT) as generator:
        generator.prefill(TOKENS[:300], max_tokens=1, pin=64)
        assert generator.report().cache is not None
        assert generator.cache is not None
        n_layers = generator.cache.spec.n_layers
        assert generator.cache.use().pinned_pages == 4 * n_layers
        generator.prefill(TOKENS[:310], max_tokens=1)
        assert generator.cache.use().pinned_pages == 0


def test_the_beginning_of_a_prompt_is_pinned_by_its_text(bundle: Bundle) -> None:
    with Generator.open(bundle("demo"), TIGHT) as generator:
        rules = "You answer in one word. " * 8
        "".join(generator.stream(rules + "What is the capital?", max_tokens=2, pin=rules))
        assert generator.cache is not None
        n_tokens = len(generator.text.encode(rules))
        pages = generator.cache.table.marked[0].sum()
        assert n_tokens // 16 <= pages <= -(-n_tokens // 16)
        with pytest.raises(UsageError, match="pin"):
            generator.prefill(TOKENS, max_tokens=1, pin=-1)


def test_the_command_says_what_is_pinned(bundle: Bundle) -> None:
    words = ["run", str(bundle("demo")), "--prompt", "Call me Ishmael. " * 30, "--max-tokens", "2", "--json"]
    plain, pinned = (
        json.loads(CliRunner().invoke(app, [*words, *more]).stdout)["cache"]["pinned_pages"]
        for more in ([], ["--pin-prompt"])
    )
    assert plain == 0 < pinned
