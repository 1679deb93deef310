"""Open a bundle and generate: the loop that everything else serves.

with Generator.open("llama.edgekv", kv_budget="64MiB") as generator:
    for piece in generator.stream("Once upon a time", max_tokens=100):
        print(piece, end="")
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from edgekv.bundle import Manifest, check_files, read_manifest
from edgekv.errors import EngineError, UsageError
from edgekv.settings import KV_BUDGET, MAX_TOKENS, PINNED, PROMPT, whole_numbers

from .decoder.base import Rows
from .engines.base import Float
from .governor import LEVEL, Level, Reclaim
from .keeper import SessionKeeper, with_prefix
from .kernels.choose import load_kernels
from .kernels.interface import Kernels
from .machine import HOST, Machine
from .options import RunOptions as RunOptions
from .options import answer_room, check_length, planned_context, verified_stamp
from .pages.budget import BudgetPlan
from .pages.cache import KVCache
from .prepare import Prepared, Segments, check_options, load_dense, prepare_cache
from .sampling import Sampler, SamplingOptions
from .sessions.folder import signals_held
from .sessions.restore import common_prefix
from .sessions.session import Session
from .stats import RunStats
from .system.lifetime import leave_to_parent
from .system.process import cache_home as cache_home
from .system.process import default_threads as default_threads
from .text import Text, TextStream
from .turns import Turns


class Generator:
    """A bundle that is ready to generate, with the cache of one sequence.

    Tokens that stay in the cache are not computed again: a prompt that begins like the last one (a conversation)
    only pays for what is new. One thread uses it at a time, and the last text that was begun is the one that goes on; a second
    text at the same time is one for :meth:`fork`, a second thread one for a generator of its own.
    """

    def __init__(self, folder: Path, options: RunOptions, machine: Machine = HOST) -> None:
        self._machine = machine
        started = machine.now()
        self.folder = folder
        self.options = options
        self.manifest: Manifest = read_manifest(folder)
        check_files(folder, self.manifest, stamp=verified_stamp(folder))
        self.kernels: Kernels = load_kernels()
        check_options(options, self.manifest.form)
        self._tokens: list[int] = []
        self._turns = Turns()
        #: The cache of the sequence and what runs on it, once a prompt gave it a size.
        self.prepared: Prepared | None = None
        self._keeper = self._open_session()  # a wrong or a locked one is refused before anything is loaded
        self._dense = load_dense(folder, self.manifest, options, machine)
        leave_to_parent(self._dense)
        self.stats = RunStats(load_seconds=machine.now() - started)

    @classmethod
    def open(cls, folder: str | Path, options: RunOptions | None = None, machine: Machine = HOST) -> Generator:
        """Open a bundle.

        Args:
            machine: what it runs on; the emulator gives a device of its own.

        Raises:
            BundleError: it cannot be used. EngineError: the engine refused a graph.
        """
        return cls(Path(folder), options or RunOptions(), machine)

    def fork(self, options: RunOptions) -> Generator:
        """Return a generator on the same engine and weights with a cache of its own; steps of the two may alternate.

        The logits of one are valid until the next step of either. ``threads`` of the engine stay as they are.
        """
        other = copy.copy(self)
        other.options = options
        other.stats = RunStats()
        check_options(options, self.manifest.form)
        other._tokens = []
        other._turns = Turns(self._turns)
        other.prepared = None
        other._keeper = other._open_session()
        return other

    @functools.cached_property
    def text(self) -> Text:
        """The tokenizer, loaded when it is first needed: who brings tokens does without its memory.

        Raises:
            BundleError: it cannot be read.
        """
        return Text.open(self.folder, self.manifest)

    # -- the session -------------------------------------------------------------------------------------------

    @property
    def session(self) -> Session | None:
        """The session that keeps the sequence, if one was asked for, or the prefix that it begins with."""
        return self._keeper.session if self._keeper is not None else None

    def save(self, *, whole: bool = False) -> None:
        """Write a checkpoint of the session now; ``whole`` includes the page that is not full yet."""
        with self._turns:
            self._save(whole=whole)

    def _save(self, *, whole: bool = False) -> None:
        if self._keeper is not None and self.prepared is not None:
            self._keeper.save(self.prepared.cache, self._tokens, whole=whole)

    def _open_session(self) -> SessionKeeper | None:
        if self.options.session is None:
            return None
        return SessionKeeper(self.options, self.manifest, machine=self._machine)

    # -- generation --------------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        sampling: SamplingOptions | None = None,
        stop: str | Sequence[str] = (),
        pin: str | int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[str]:
        """Generate text, piece by piece.

        Args:
            prompt: text, or tokens.
            stop: the text ends before any of these; one may name a special token, such as ``<|im_end|>``.
            pin: what must stay, such as a system prompt: the beginning of the prompt, or its number of tokens. Reclaim
                offloads its pages last and never drops them.
            progress: called during prefill with (tokens done, tokens to do).

        Raises:
            UsageError: an argument has another type or is out of range, such as a token beyond the vocabulary; another thread
                uses the generator; or the text cannot go on, since the generator was given another one or was closed.
            PromptTooLong: the prompt leaves no room in the context. BudgetError: the budget is too small.
            OutOfPages, StoreError: no room, or flash failed; the text so far is right.
        """
        tokens = self.text.encode(PROMPT.check(prompt)) if isinstance(prompt, str) else self._ids(prompt)
        stream = TextStream(self.text, stop)
        if isinstance(pin, str):
            pin = common_prefix(self.text.encode(PROMPT.check(pin)), tokens)
        for token in self.tokens(tokens, max_tokens=max_tokens, sampling=sampling, pin=pin, progress=progress):
            yield stream.push(token)
            if stream.stopped:
                self.stats.finish_reason = "stop"
                return
        yield stream.flush()

    def tokens(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 256,
        sampling: SamplingOptions | None = None,
        pin: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[int]:
        """Generate tokens; ends at ``max_tokens``, where the context ends, or before an end-of-sequence token.

        ``stats.finish_reason`` then says which. See :meth:`stream`.
        """
        sampling = sampling or SamplingOptions()
        sampler = Sampler(sampling)
        self.stats.seed = sampler.seed if sampling.temperature else None
        stop_tokens = self.manifest.model.eos_token_ids
        sequence = self._ids(prompt)
        with self._turns:
            self.stats.finish_reason, self.stats.context_full = None, False
            logits = self.prefill(prompt, max_tokens=MAX_TOKENS.check(max_tokens), pin=pin, progress=progress)
            text = self._turns.begin()
            self._turns.take(text)
            token = sampler.choose(logits, sequence)
        count = answer_room(self.options.context or self.manifest.model.max_context, max(len(prompt), 1), max_tokens)
        try:
            for left in reversed(range(count)):
                if token in stop_tokens:
                    self.stats.finish_reason = "stop"
                    return
                sequence.append(token)
                if self._keeper is not None:
                    self._keeper.sequence = sequence
                if not left:
                    self.stats.finish_reason, self.stats.context_full = "length", count < max_tokens
                yield token
                if not left:
                    return
                with self._turns:
                    self._turns.take(text)
                    started = self._machine.now()
                    logits = self._run([token], "last")[-1]
                    self.stats.decode_seconds += self._machine.now() - started
                    self.stats.decode_tokens += 1
                    token = sampler.choose(logits, sequence)
        finally:
            self._turns.over(text, self._save)

    def prefill(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        pin: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Float:
        """Bring the cache to hold the prompt and return the logits after its last token [vocab_size] float32.

        Args:
            pin: the first so many tokens of the prompt are pinned, and no others; see :meth:`stream`.
        """
        prompt = self._ids(prompt) or [self.manifest.model.bos_token_id or 0]
        with self._turns:
            self._turns.begin()
            return self._prefill(prompt, max_tokens, pin, progress)

    def _prefill(self, prompt: Sequence[int], max_tokens: int, pin: int, progress: Callable[[int, int], None]) -> Float:
        fresh, machine = self.prepared is None, self._machine
        self._keeper = with_prefix(self._keeper, self.options, self.manifest, prompt, fresh=fresh, machine=machine)
        self.prepare(len(prompt), max_tokens)
        assert self.prepared is not None
        reused = self._reuse(prompt)
        self.prepared.cache.pin(min(PINNED.check(pin), len(prompt)))
        started = self._machine.now()
        done, total = reused, len(prompt)
        chunk = self.options.prefill_chunk
        logits = None
        if self._keeper is not None:
            self._keeper.began(self.prepared.cache, reused, total)
        while done < total:
            stop = done + chunk if self._keeper is None else self._keeper.stop(done, total, chunk)
            part = prompt[done:stop]
            logits = self._run(part, "last" if done + len(part) == total else "none")
            done += len(part)
            progress(done - reused, total - reused)
        assert logits is not None
        self.stats.prefill_seconds += self._machine.now() - started
        self.stats.prefill_tokens += total - reused
        self.stats.reused_tokens += reused
        last: Float = logits[-1]
        return last

    def step(self, tokens: Sequence[int]) -> Float:
        """Add tokens to a sequence that :meth:`prefill` began and return the logits after the last one [vocab_size] float32.

        Raises:
            UsageError: a token is not of the vocabulary, or there is none. EngineError: the logits are not finite. Nothing
                was added.
        """
        with self._turns:
            if self.prepared is None:
                raise UsageError("there is no sequence to add to; call prefill() first")
            tokens = self._some(tokens)
            self._turns.begin()
            logits: Float = self._run(tokens, "last")[-1]
        return logits

    def score(self, tokens: Sequence[int]) -> Float:
        """Add tokens and return the logits after each of them [T, vocab_size] (teacher forcing); not with a session."""
        if self._keeper is not None:
            raise UsageError("score() computes every token; use it without a session")
        tokens = self._some(tokens)
        with self._turns:
            self._turns.begin()
            self.prepare(len(self._tokens) + len(tokens), 0)
            parts = []
            for start in range(0, len(tokens), self.options.prefill_chunk):
                parts.append(self._run(tokens[start : start + self.options.prefill_chunk], "all").copy())
        return np.concatenate(parts)

    def _ids(self, tokens: Sequence[int]) -> list[int]:
        """Check that tokens are numbers of the vocabulary, and return them as plain integers."""
        ids: list[int] = whole_numbers(tokens, "a token", most=self.manifest.model.vocab_size - 1).tolist()
        return ids

    def _some(self, tokens: Sequence[int]) -> list[int]:
        ids = self._ids(tokens)
        if not ids:
            raise UsageError("there is no token to add; give at least one")
        return ids

    def _run(self, tokens: Sequence[int], rows: Rows) -> Float:
        prepared = self.prepared
        self._turns.check_open()
        assert prepared is not None
        prepared.governor.between_steps()
        start = len(self._tokens)
        check_length(self.options, self.manifest.model.max_context, start + len(tokens))
        try:
            positions = np.arange(start, start + len(tokens), dtype=np.int64)
            logits = prepared.forward.step(np.asarray(tokens, np.int64), positions, rows)
            _check_finite(logits, start + len(tokens) - len(logits))
            self._tokens += map(int, tokens)
        except BaseException:
            # A step that failed half way leaves some layers longer than others: back to what all of them hold.
            with signals_held():
                kept = prepared.cache.truncate(start)
                del self._tokens[kept:]
            raise
        if self._keeper is not None:
            self._keeper.stepped(start, prepared.cache, self._tokens)
        return logits

    def _reuse(self, prompt: Sequence[int]) -> int:
        """Cut the cache to the longest common prefix; at least the last token is computed again, for its logits."""
        assert self.prepared is not None
        cache = self.prepared.cache
        if self._keeper is not None:
            restored = self._keeper.restore(cache, prompt)
            if restored is not None:
                self._tokens = restored
        common = common_prefix(self._tokens, prompt[:-1])
        if common < len(self._tokens):
            with signals_held():
                common = cache.truncate(common)
                del self._tokens[common:]
        return common

    # -- memory ------------------------------------------------------------------------------------------------

    @property
    def cache(self) -> KVCache | None:
        """The cache of the sequence, once a prompt gave it a size."""
        return self.prepared.cache if self.prepared is not None else None

    @property
    def engine(self) -> str:
        """What computes the dense parts, for messages."""
        dense = self._dense
        return dense.engine.description if isinstance(dense, Segments) else dense.description

    @property
    def budget(self) -> BudgetPlan | None:
        """How the budget was divided, once a prompt gave the cache a size."""
        return self.prepared.plan if self.prepared is not None else None

    def prepare(self, prompt_tokens: int, max_tokens: int) -> BudgetPlan:
        """Make a cache for a prompt and what follows it, unless there is one that is long enough; return its budget.

        A sequence that becomes longer than its cache was made for starts over with a new one (or from its session).

        Raises:
            PromptTooLong: the prompt leaves no room in it. BudgetError, StoreError: see :func:`prepare_cache`.
        """
        context = planned_context(self.options, self.manifest.model.max_context, prompt_tokens, max_tokens)
        with self._turns:
            if self.prepared is not None:
                if context <= self.prepared.context:
                    return self.prepared.plan
                self._turns.begin()
                self._save(whole=True)
                self._drop_cache()
            self.prepared = prepare_cache(
                self.manifest,
                self._dense,
                self.kernels,
                self.options,
                self._machine,
                context=context,
                session=self.session,
                turns=self._turns,
                abandon=self._abandon_session,
            )
            return self.prepared.plan

    def set_budget(self, kv_budget: int | str) -> Reclaim | None:
        """Change the KV budget, between two tokens; see :meth:`Governor.set_budget`. Before the first prompt: None."""
        KV_BUDGET.check(kv_budget)
        with self._turns:
            if self.prepared is None:
                self.options = replace(self.options, kv_budget=kv_budget)
                return None
            return self.prepared.governor.set_budget(kv_budget)

    def on_pressure(self, level: Level | str) -> Reclaim | None:
        """Tell, between two tokens, how short memory is; see :meth:`Governor.on_pressure`."""
        level = LEVEL.check(level)
        with self._turns:
            return self.prepared.governor.on_pressure(level) if self.prepared is not None else None

    def report(self) -> RunStats:
        """Return the counters of the run, with what the cache holds now and the peak RSS of the process."""
        self.stats.peak_rss_bytes = self._machine.peak_rss_bytes()
        if self.prepared is not None:
            cache, attender = self.prepared.cache, self.prepared.attender
            self.stats.cache = replace(cache.use(), budget_bytes=self.prepared.plan.budget_bytes)
            self.stats.pages = cache.manager.counters
            self.stats.selection = attender.selection.summary() if attender is not None else None
            self.stats.pressure = self.prepared.governor.stats
            if cache.manager.store is not None:
                self.stats.count(cache.manager.store.counters)
        return self.stats

    def close(self) -> None:
        """Save and close the session, if there is one, and free the cache and the offload file.

        A step that another thread is in ends first. A generator that is forgotten instead frees everything too; its session
        is as it was at the last checkpoint.

        Raises:
            StoreError: the session could not be saved; everything is free nevertheless.
        """
        self._turns.close()
        with self._turns.alone():
            try:
                self._save(whole=True)
            finally:
                self._drop_cache()
                keeper, self._keeper = self._keeper, None
                if keeper is not None:
                    keeper.close()

    def _abandon_session(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.session.abandon()

    def _drop_cache(self) -> None:
        prepared, self.prepared = self.prepared, None
        self._tokens = []
        if prepared is not None:
            prepared.close()

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _check_finite(logits: Float, first: int) -> None:
    """Refuse logits [R, vocab_size] of positions ``first`` and on from which no token can be chosen.

    Raises:
        EngineError: one is NaN or infinite; the error names the position.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(
            np.add.reduce(logits, axis=None)
        ):  # NaN and infinity show in the sum: one pass, 20 us for 128k logits
            return
    wrong = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if wrong.size:
        raise EngineError(
            f"the logits at token {first + int(wrong[0])} are not finite (NaN or infinite): weights or activations overflow;"
            " export the model again with --weights fp32 or int8"
        )
