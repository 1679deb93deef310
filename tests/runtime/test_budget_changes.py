"""The budget may change between any two tokens: one rule, whatever the form and the pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgekv.errors import UsageError, WriteLimit
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.tiers import KVMode, Tier

Bundle = Callable[..., Path]
PROMPT = "It was a dark night and he " * 40


def change(bundle: Path, kv: KVMode) -> list[int]:
    """Generate while the budget goes down, up again, and where it may not; returns the tokens."""
    with Generator.open(bundle, RunOptions(kv=kv, context=1024)) as generator:
        steps = generator.tokens(generator.text.encode(PROMPT), max_tokens=80)
        tokens = [next(steps)]
        assert generator.budget is not None
        most = generator.budget.budget_bytes
        for share in (0.4, 0.25, 0.5, 0.3, 1.0):  # layers give up different numbers of pages
            generator.set_budget(int(most * share))
            tokens += [next(steps) for _ in range(4)]
        assert generator.prepared is not None
        before = generator.prepared.governor.budget_bytes
        for too_much in (most + 1, "64MiB", "1000%"):
            with pytest.raises(UsageError, match=r"the budget cannot grow to .*: this run began with"):
                generator.set_budget(too_much)
            assert generator.prepared.governor.budget_bytes == before
            tokens.append(next(steps))
        return tokens


@pytest.mark.slow
def test_the_inline_form_of_executorch_follows_its_budget_too(bundle: Bundle) -> None:
    pytest.importorskip("executorch")
    pytest.importorskip("torchao")
    assert len(change(bundle("demo", form="inline", engine="executorch"), KVMode.FP16)) == 24


@pytest.mark.parametrize("form", ["split", "inline"])
@pytest.mark.parametrize("kv", list(KVMode))
def test_a_budget_goes_down_and_up_again_but_never_above_that_of_the_start(
    bundle: Bundle, form: str, kv: KVMode
) -> None:
    assert len(change(bundle("demo", form=form), kv)) == 24


def test_a_change_that_fails_half_way_takes_no_memory_and_leaves_no_store(bundle: Bundle, tmp_path: Path) -> None:
    """The day's writes end in the middle of it: what went to flash comes back, and the staging ring goes."""
    folder = bundle("demo")
    with Generator.open(folder, RunOptions(kv=KVMode.INT8, context=1024, prefixes=False)) as free:
        expected = list(free.tokens(free.text.encode(PROMPT), max_tokens=40))
    options = RunOptions(kv=KVMode.INT8, context=1024, offload=tmp_path, max_write_per_day="200KiB", prefixes=False)
    with Generator.open(folder, options) as generator:
        steps = generator.tokens(generator.text.encode(PROMPT), max_tokens=40)
        tokens = [next(steps) for _ in range(10)]
        assert generator.prepared is not None
        governor, cache = generator.prepared.governor, generator.prepared.cache
        before = governor.budget_bytes
        with pytest.raises(WriteLimit):
            generator.on_pressure("critical")
        assert governor.budget_bytes == before
        assert cache.manager.store is None
        assert (cache.table.tier[:, : cache.table.n_pages(0)] <= Tier.WARM).all()
        cache.check()
        assert [*tokens, *steps] == expected
