"""Runs of one text side by side: each lane is a cache of its own on the one engine, all fed the same tokens in step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgekv.errors import UsageError
from edgekv.runtime.attention.select import SelectionStats
from edgekv.runtime.engines.base import Float
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.pages.budget import BudgetPlan
from edgekv.tiers import KVMode

from .controls import Control

#: Tokens per step while the first part of the text is read: two to four pages, so that most attention goes to sealed ones.
CHUNK = 64
#: Tokens that a short lane keeps free when it is given a prompt.
ANSWER_ROOM = 32


@dataclass(frozen=True)
class Schedule:
    """The first ``prefill`` tokens go in chunks, the others one by one, as in generation."""

    n_tokens: int
    prefill: int

    def steps(self) -> list[tuple[int, int]]:
        """Return [start, stop) of every step."""
        chunks = [(a, min(a + CHUNK, self.prefill)) for a in range(0, self.prefill, CHUNK)]
        return chunks + [(a, a + 1) for a in range(self.prefill, self.n_tokens)]


class Lane:
    """A cache that is fed a text and gives logits. ``context``: tokens that its budget is reckoned for."""

    def __init__(self, parent: Generator, options: RunOptions, context: int, *, control: Control | None = None) -> None:
        self.generator = parent.fork(dataclasses.replace(options, context=context, prefill_chunk=CHUNK))
        self._control = control
        if control is not None:
            control.install(self.generator)

    @property
    def plan(self) -> BudgetPlan:
        """How the lane's budget is divided.

        Raises:
            BudgetError: it is too small.
        """
        return self.generator.prepare(0, 0)

    def score(self, tokens: Sequence[int], start: int, stop: int) -> Float:
        """Feed tokens[start:stop] and return the logits after each of them [T, vocab_size]."""
        self._before_step(start)
        return self.generator.score(tokens[start:stop])

    def prefill(self, tokens: Sequence[int]) -> Float:
        """Bring the cache to hold the tokens and return the last logits; what it holds already is not read again."""
        logits = self.generator.prefill(tokens, max_tokens=0)
        self._position = len(tokens)
        return logits

    def step(self, token: int) -> Float:
        """Feed one token and return the logits after it."""
        self._before_step(self._position)
        self._position += 1
        return self.generator.step([token])

    def _before_step(self, position: int) -> None:
        if self._control is not None:
            self._control.before_step(self.generator, position)

    @property
    def pages_dropped(self) -> int:
        """Pages that the lane has lost so far."""
        cache = self.generator.cache
        return 0 if cache is None else cache.manager.counters.pages_dropped

    @property
    def selection(self) -> SelectionStats | None:
        """What selective attention did, if it left pages out."""
        return self.generator.report().selection

    def bytes_held(self) -> tuple[int, int]:
        """Return the bytes of RAM for keys and values (arena and staging ring) and those on flash."""
        cache, plan = self.generator.cache, self.plan
        return plan.arena_bytes + plan.staging_bytes, 0 if cache is None else cache.use().bytes_by_tier["COLD"]

    def close(self) -> None:
        """Free the cache."""
        self.generator.close()


class ShortLane(Lane):
    """Full attention over the most recent tokens only: what fits the same bytes. The oldest half goes when it is full."""

    def __init__(self, parent: Generator, options: RunOptions, window: int) -> None:
        super().__init__(parent, options, window)
        self._parent = parent
        self.window = window
        self._first = 0

    def score(self, tokens: Sequence[int], start: int, stop: int) -> Float:
        """Feed tokens[start:stop], starting over with the latest half window when they no longer fit."""
        if stop - self._first > self.window:
            self.generator.close()
            self.generator = self._parent.fork(self.generator.options)
            self._first = stop - max(self.window // 2, stop - start)
            if start > self._first:
                self.generator.score(tokens[self._first : start])
        return super().score(tokens, start, stop)

    def prefill(self, tokens: Sequence[int]) -> Float:
        """Read the last tokens that fit, with room for a short answer."""
        return super().prefill(tokens[-max(self.window - ANSWER_ROOM, 1) :])


def reference_options(options: RunOptions) -> RunOptions:
    """Return the options of the full fp16 cache: nothing compressed, offloaded, dropped or left out."""
    return dataclasses.replace(
        options,
        kv=KVMode.FP16,
        kv_budget=None,
        allow_drop=False,
        policy="lru",
        offload=None,
        flash_limit=None,
        attend="exact",
    )


def resident_options(options: RunOptions) -> RunOptions:
    """Return the options of the same tier in RAM: INT8 from the seal, no budget, no flash."""
    return dataclasses.replace(reference_options(options), kv=KVMode.INT8, attend=options.attend)


def run_lanes(
    lanes: Sequence[Lane],
    tokens: Sequence[int],
    schedule: Schedule,
    compare: Callable[[int, list[Float]], None],
    advance: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Feed the text to every lane in step.

    Args:
        compare: called with the first position of a step and the logits of every lane.
        advance: called with the number of tokens that were done, per step.
    """
    for start, stop in schedule.steps():
        compare(start, [lane.score(tokens, start, stop) for lane in lanes])
        advance(stop - start)


def greedy(lane: Lane, prompt: Sequence[int], count: int, advance: Callable[[int], None]) -> list[int]:
    """Continue the prompt greedily by ``count`` tokens, past any end of sequence."""
    logits = lane.prefill(prompt)
    said: list[int] = []
    while len(said) < count:
        said.append(int(np.argmax(logits)))
        if len(said) < count:
            logits = lane.step(said[-1])
        advance(1)
    return said


def plan_schedule(n_available: int, wanted: int, decode: int, limit: int) -> Schedule:
    """Choose how much of the text is used: up to ``wanted`` tokens, the last ``decode`` of them one by one.

    Raises:
        UsageError: the text is too short to seal a few pages.
    """
    n_tokens = min(n_available, wanted, limit)
    if n_tokens < 2 * CHUNK:
        if limit < 2 * CHUNK:
            raise UsageError(f"the model was made for {limit} tokens; verify needs {2 * CHUNK} at least")
        raise UsageError(f"the text has {n_available} tokens; verify needs {2 * CHUNK} at least: give a longer --text")
    return Schedule(n_tokens, n_tokens - min(decode, n_tokens // 2))
