"""Measures a bundle: how fast prompts are read and tokens generated, behind so many tokens in the cache.

What makes a number worth something:

- Nothing is reused that a run would compute: no cached prefix, no session, and behind the depth nothing of an earlier repetition.
- The tokens in the cache were computed, not made up. The cache is cut back to them after each repetition. Where the budget sends
  pages to flash, each repetition has a cache and a file of its own instead: a page that is on flash already would leave RAM
  without a write, and records that take the places of others lie elsewhere in the file.
- Tokens are random and given, not chosen: sampling is not measured, and no end-of-sequence token ends anything.
- Each kind of step is warmed up. Repetitions take turns, and go through the depths there and back, so that a machine that becomes
  hot slows all of them alike.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgekv.bundle import Manifest, read_manifest
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.pages.budget import BudgetPlan
from edgekv.spec import ModelSpec

from .environment import Environment, environment
from .workload import Case, Workload

#: Tokens that are generated before anything is timed.
WARM_UP = 4
#: Of the random tokens: each measurement has the same ones.
SEED = 7


@dataclass(frozen=True)
class Sample:
    """One repetition; ``bytes_*`` of flash."""

    seconds: float
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Result:
    """The repetitions of a case."""

    case: Case
    samples: tuple[Sample, ...]

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [self.case.tokens / sample.seconds for sample in self.samples]

    @property
    def tokens_per_s(self) -> float:
        """The median."""
        return statistics.median(self.rates)

    @property
    def spread(self) -> float:
        """The median absolute deviation from the median, in tokens per second."""
        middle = self.tokens_per_s
        return statistics.median(abs(rate - middle) for rate in self.rates)

    @property
    def read_bytes_per_token(self) -> float:
        """Bytes read from flash for a token, over all repetitions."""
        return sum(sample.bytes_read for sample in self.samples) / (len(self.samples) * self.case.tokens)

    @property
    def written_bytes_per_token(self) -> float:
        """Bytes written to flash for a token, over all repetitions."""
        return sum(sample.bytes_written for sample in self.samples) / (len(self.samples) * self.case.tokens)


@dataclass(frozen=True)
class Bench:
    """What was measured, with what, on what. ``budget_changes``: by pressure on the machine's memory, while it was measured."""

    name: str
    manifest: Manifest
    options: RunOptions
    context: int
    plan: BudgetPlan
    environment: Environment
    results: tuple[Result, ...]
    peak_rss_bytes: int
    budget_changes: int

    @property
    def repeat(self) -> int:
        """How often each case was measured."""
        return len(self.results[0].samples)

    @property
    def kv(self) -> str:
        """How sealed pages are kept."""
        return "int8" if self.plan.compress_at_seal else "fp16"

    @property
    def limited(self) -> bool:
        """Whether a budget was given."""
        return self.options.kv_budget is not None


def measure(
    bundle: Path,
    workload: Workload,
    options: RunOptions,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Bench:
    """Measure a bundle.

    Args:
        options: as for a run, but that no prefix and no session is used. The context is that of the deepest measurement, for
            all of them: a share of memory is a share of that.
        progress: called with what is measured next, repetitions done, repetitions in all.

    Raises:
        UsageError: a depth leaves no room in the model's context. Everything that opening and running a bundle raises.
    """
    manifest, cases = read_manifest(bundle), workload.cases()
    for case in cases:
        case.check_room(manifest.model.max_context)
    context = max(case.depth + case.tokens for case in cases)
    options = replace(options, context=context, prefixes=False, session=None)
    samples: dict[Case, list[Sample]] = {case: [] for case in cases}
    with Generator.open(bundle, options) as generator, contextlib.closing(_Sequence(generator, context)) as sequence:
        progress("warm-up", 0, len(cases) * workload.repeat)
        for case in {(case.kind, case.tokens): case for case in cases}.values():
            most = options.prefill_chunk if case.kind == "pp" else WARM_UP
            sequence.sample(replace(case, tokens=min(case.tokens, most), depth=0))
        for done, case in enumerate(workload.order()):
            progress(case.name, done, len(cases) * workload.repeat)
            samples[case].append(sequence.sample(case))
        return Bench(
            name=bundle.resolve().name.removesuffix(".edgekv"),
            manifest=manifest,
            options=options,
            context=context,
            plan=sequence.plan,
            environment=environment(generator),
            results=tuple(Result(case, tuple(found)) for case, found in samples.items()),
            peak_rss_bytes=generator.report().peak_rss_bytes,
            budget_changes=sequence.budget_changes,
        )


class _Sequence:
    """The sequence that is measured, again and again.

    Args:
        loaded: whose engine and weights it runs on; it has no cache itself.
    """

    def __init__(self, loaded: Generator, context: int) -> None:
        self._loaded = loaded
        self._context = context
        self._tokens = _random_tokens(loaded.manifest.model, context)
        self._changes_before = 0
        self._begin()

    def _begin(self) -> None:
        self._generator = self._loaded.fork(self._loaded.options)
        self.plan = self._generator.prepare(self._context, 0)

    def close(self) -> None:
        """Free the cache."""
        self._generator.close()

    @property
    def budget_changes(self) -> int:
        """How often pressure has changed the budget."""
        pressure = self._generator.report().pressure
        return self._changes_before + (pressure.changes if pressure is not None else 0)

    def sample(self, case: Case) -> Sample:
        """Bring the cache to its depth, and time what comes behind it."""
        self._reach(case.depth)
        tokens = self._tokens[: case.depth + case.tokens]
        read, written = self._flash()
        seconds = self._read(tokens, case.depth) if case.kind == "pp" else self._generate(tokens[case.depth :])
        read_after, written_after = self._flash()
        return Sample(seconds, read_after - read, written_after - written)

    def _reach(self, depth: int) -> None:
        if not self.plan.fits:
            self._changes_before = self.budget_changes
            self.close()
            self._begin()
        elif not depth:
            self._generator.go_back([])
        if depth:
            self._generator.prefill(self._tokens[:depth], max_tokens=0)

    def _read(self, prompt: list[int], depth: int) -> float:
        stats = self._generator.stats
        before, reused = stats.prefill_seconds, stats.reused_tokens
        self._generator.prefill(prompt, max_tokens=0)
        assert stats.reused_tokens - reused == depth, "the prompt behind the depth is not what was computed"
        return stats.prefill_seconds - before

    def _generate(self, tokens: list[int]) -> float:
        started = time.perf_counter()
        for token in tokens:
            self._generator.step([token])
        return time.perf_counter() - started

    def _flash(self) -> tuple[int, int]:
        stats = self._generator.report()
        return stats.bytes_read, stats.bytes_written


def _random_tokens(model: ModelSpec, count: int) -> list[int]:
    """Return tokens, none of which ends a text."""
    known = np.setdiff1d(np.arange(model.vocab_size), model.eos_token_ids)
    tokens: list[int] = np.random.default_rng(SEED).choice(known, count).tolist()
    return tokens
