"""A step through all layers at once leaves the same results and the same cache as one layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekv.runtime.attention.native_walk import Streaming
from edgekv.runtime.decoder.base import Rows
from edgekv.runtime.decoder.split import SplitForward
from edgekv.runtime.engines.base import StepBuffers
from edgekv.runtime.engines.onnx.segments import OnnxSegments
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.tiers import KVMode, Tier

Bundle = Callable[..., Path]
Logits = list[np.ndarray]


def run(
    folder: Path, mode: KVMode, count: int = 70, first: int = 21, budget: str | None = None
) -> tuple[Logits, dict[str, np.ndarray]]:
    """Decode over two page boundaries; return the logits and the columns of the page table."""
    tokens = np.random.default_rng(3).integers(0, 256, first + count).tolist()
    options = RunOptions(threads=2, kv=mode, context=first + count + 37, kv_budget=budget)
    with Generator.open(folder, options) as generator:
        generator.prefill(tokens[:first], max_tokens=count)
        logits = [generator.step([token]).copy() for token in tokens[first:]]
        assert generator.cache is not None
        generator.cache.check()
        table = generator.cache.table
        columns = {name: getattr(table, name).copy() for name in ("tier", "last_used", "mass", "tokens", "n_slots")}
        columns |= {name: table.refs[name].copy() for name in ("mask", "position", "n_slots", "kind")}
        return logits, columns


@pytest.mark.parametrize("mode", [KVMode.FP16, KVMode.INT8])
def test_the_short_way_equals_the_general_way(mode: KVMode, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundle("demo")
    taken: list[bool] = []
    choose = SplitForward.goes_at_once

    def watched(self: SplitForward, n_tokens: int, rows: Rows) -> bool:
        taken.append(choose(self, n_tokens, rows))
        return taken[-1]

    monkeypatch.setattr(SplitForward, "goes_at_once", watched)
    short = run(folder, mode)
    assert sum(taken) == 70
    monkeypatch.setattr(SplitForward, "goes_at_once", lambda self, n_tokens, rows: False)
    general = run(folder, mode)
    for ours, theirs in zip(short[0], general[0], strict=True):
        assert np.array_equal(ours, theirs)
    for name, column in short[1].items():
        assert np.array_equal(column, general[1][name]), name


@pytest.mark.skipif(load_kernels().isa() == "numpy", reason="the native kernels stream")
@pytest.mark.slow
def test_the_short_way_over_pages_on_flash_equals_the_general_way(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes a new page's frame, or finds a plan outdated: a page moves every few tokens."""
    folder = bundle("demo")
    streamed: list[bool] = []
    plan = Streaming.plan

    def watched(self: Streaming, n_pages: int) -> list[bool]:
        planned = plan(self, n_pages)
        streamed.append(any(planned))
        return planned

    monkeypatch.setattr(Streaming, "plan", watched)
    short = run(folder, KVMode.INT8, first=800, budget="24%")
    assert sum(streamed) > 50
    assert (short[1]["tier"] == Tier.COLD).sum() > 20
    monkeypatch.setattr(SplitForward, "goes_at_once", lambda self, n_tokens, rows: False)
    general = run(folder, KVMode.INT8, first=800, budget="24%")
    for ours, theirs in zip(short[0], general[0], strict=True):
        assert np.array_equal(ours, theirs)
    for name, column in short[1].items():
        assert np.array_equal(column, general[1][name]), name


def test_a_step_that_fails_half_way_leaves_the_cache_as_it_was(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with Generator.open(bundle("demo"), RunOptions(threads=1, context=64)) as generator:
        tokens = list(range(16))
        generator.prefill(tokens, max_tokens=8)
        with monkeypatch.context() as patch:
            segment = OnnxSegments.run

            def fail(self: OnnxSegments, index: int, buffers: StepBuffers) -> None:
                if index == 2:
                    raise KeyboardInterrupt
                segment(self, index, buffers)

            patch.setattr(OnnxSegments, "run", fail)
            with pytest.raises(KeyboardInterrupt):
                generator.step([5])
        cache = generator.cache
        assert cache is not None
        cache.check()
        assert (cache.table.n_slots == 16).all()
        again = generator.step([5]).copy()
    with Generator.open(bundle("demo"), RunOptions(threads=1, context=64)) as generator:
        generator.prefill(tokens, max_tokens=8)
        assert np.array_equal(generator.step([5]), again)
