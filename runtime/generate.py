"""Open a bundle and generate: the loop that everything else serves.

with Generator.open("llama.edgekv", RunOptions(kv_budget="64MiB")) as generator:
    for piece in generator.stream("Once upon a time", max_tokens=100):
        print(piece, end="")
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import abc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from edgekv.bundle import check_files, read_manifest
from edgekv.errors import UsageError
from edgekv.schema import shown
from edgekv.settings import BUNDLE, KV_BUDGET, MAX_TOKENS, PINNED, TO_FOLLOW, TOKENS_SO_FAR, instance, token_row
from edgekv.tiers import KVMode

from .chat import Chats, Progress
from .decoder.together import rows_agree, rows_pay
from .engines.base import Float
from .governor import LEVEL, Level, Reclaim
from .keeper import Keeper, SessionKeeper, with_prefix
from .kernels.choose import load_kernels
from .kernels.interface import Kernels
from .machine import HOST, Machine
from .options import RunOptions as RunOptions
from .options import answer_room, planned_context, verified_stamp
from .pages.budget import BudgetPlan
from .pages.cache import KVCache
from .prepare import Segments, check_options, load_dense, plan_cache, prepare_cache
from .sampling import Sampler, SamplingOptions
from .sequence import OneSequence
from .sessions.prefixes import find_prefix
from .sessions.restore import common_prefix
from .sessions.session import Session
from .stats import RunStats
from .system.lifetime import leave_to_parent
from .system.process import cache_home as cache_home
from .system.process import default_threads as default_threads
from .text import Text, TextStream
from .turns import Turns


class Generator(Chats, OneSequence):
    """A bundle that is ready to generate, with the cache of one sequence.

    Tokens that stay in the cache are not computed again: a prompt that begins like the last one (a conversation)
    only pays for what is new. One thread uses it at a time, and the last text that was begun is the one that goes on; a second
    text at the same time is one for :meth:`fork`, a second thread one for a generator of its own.
    """

    def __init__(self, folder: Path, options: RunOptions, machine: Machine = HOST) -> None:
        started = machine.now()
        manifest = read_manifest(folder)
        check_files(folder, manifest, stamp=verified_stamp(folder))
        super().__init__(folder, manifest, options, machine)
        self.kernels: Kernels = load_kernels()
        check_options(options, manifest.form)
        self._keeper = self._open_session()  # a wrong or a locked one is refused before anything is loaded
        self._dense = load_dense(folder, manifest, options, machine)
        leave_to_parent(self._dense)
        self.stats = RunStats(load_seconds=machine.now() - started)

    @classmethod
    def open(cls, folder: str | Path, options: RunOptions | None = None, machine: Machine = HOST) -> Generator:
        """Open a bundle.

        Args:
            machine: what it runs on; the emulator gives a device of its own.

        Raises:
            UsageError: an argument has another type. BundleError: it cannot be used. EngineError: the engine refused a graph.
        """
        if not isinstance(machine, Machine):
            raise UsageError(f"machine must be a Machine, such as HOST or an emulated one, not {shown(machine)}")
        return cls(
            BUNDLE.check(folder), RunOptions() if options is None else instance(options, RunOptions, "options"), machine
        )

    def fork(self, options: RunOptions, keeper: Keeper | None = None) -> Generator:
        """Return a generator on the same engine and weights with a cache of its own; steps of the two may alternate.

        ``threads`` of the engine stay as they are.

        Args:
            keeper: keeps its sequences, where ``options`` name no session.
        """
        other = copy.copy(self)
        other.options = instance(options, RunOptions, "options")
        other.stats = RunStats()
        check_options(options, self.manifest.form)
        other._begin_anew()
        other._turns = Turns(self._turns)
        other.prepared = None
        other._keeper = other._open_session() or keeper
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
        return self._keeper.session if isinstance(self._keeper, SessionKeeper) else None

    def save(self, *, whole: bool = False) -> None:
        """Write a checkpoint of the session now; ``whole`` includes the page that is not full yet."""
        with self._turns:
            self._save(whole=whole)

    def _open_session(self) -> SessionKeeper | None:
        if self.options.session is None:
            return None
        return SessionKeeper(self.options, self.manifest, machine=self._machine)

    @property
    def sequence(self) -> list[int]:
        """The tokens of the last prompt and its answer; a session holds the same ones."""
        return list(self._sequence)

    # -- generation --------------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        sampling: SamplingOptions | None = None,
        stop: str | Sequence[str] = (),
        before: Sequence[int] = (),
        pin: str | int = 0,
        progress: Progress | None = None,
    ) -> abc.Generator[str]:
        """Generate text, piece by piece.

        Args:
            prompt: text, or tokens.
            stop: the text ends before any of these; one may name a special token, such as ``<|im_end|>``.
                The sequence, and its session, then end there too.
            before: tokens whose text the answer goes on in the middle of, such as those of a session that is continued.
            pin: what must stay, such as a system prompt: the beginning of the prompt, or its number of tokens. Reclaim
                offloads its pages last and never drops them.
            progress: called during prefill with (tokens done, tokens to do). When it gives the generator another text, this one
                cannot go on; a fork is free to use.

        Raises:
            UsageError: an argument has another type or is out of range, such as a token beyond the vocabulary; another thread
                uses the generator; or the text cannot go on, since the generator was given another one or was closed.
            PromptTooLong: the prompt leaves no room in the context. BudgetError: the budget is too small.
            OutOfPages, StoreError: no room, or flash failed; the text so far is right.
        """
        tokens = self.prompt(self.text.encode(prompt) if isinstance(prompt, str) else prompt)
        stream = TextStream(self.text, stop, self._ids(before))
        if isinstance(pin, str):
            pin = common_prefix(self.text.encode(pin), tokens)
        given: list[int] = []
        self.stats.answer_tokens = 0
        with contextlib.closing(
            self.tokens(tokens, max_tokens=max_tokens, sampling=sampling, pin=pin, progress=progress)
        ) as answer:
            for token in answer:
                given.append(token)
                self.stats.answer_tokens += 1
                yield stream.push(token)
                if stream.stopped:
                    break
        if not stream.stopped:
            yield stream.flush()
        if stream.stopped:
            self.stats.finish_reason = "stop"
            self._end_at([*tokens, *given], [*tokens, *given[: stream.n_before]], stream.rest)

    def go_back(self, sequence: Sequence[int]) -> None:
        """Let the sequence, and its session, be an earlier one again; what both begin with alike stays in the cache.

        Raises:
            UsageError: a token is not of the vocabulary, or another thread uses the generator.
        """
        sequence = self._ids(sequence)
        with self._turns:
            self._turns.begin()
            if self.prepared is not None:
                self._follow(sequence)
                self._save()

    def _end_at(self, sequence: list[int], kept: list[int], rest: str) -> None:
        """Let a sequence end where the text did that was given: behind the tokens ``kept`` and a part of the next one."""
        with self._turns:
            if self._sequence == sequence:  # else it is another one by now
                self._follow(kept + self.text.encode_behind(kept, rest) if rest else kept)
                self._save()

    def tokens(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 256,
        sampling: SamplingOptions | None = None,
        pin: int = 0,
        progress: Progress | None = None,
    ) -> abc.Generator[int]:
        """Generate tokens; ends at ``max_tokens``, where the context ends, or before an end-of-sequence token.

        ``stats.finish_reason`` then says which. See :meth:`stream`.
        """
        sampling = SamplingOptions() if sampling is None else instance(sampling, SamplingOptions, "sampling")
        sampler = Sampler(sampling)
        self.stats.seed = sampler.seed if sampling.temperature else None
        stop_tokens = self.manifest.model.eos_token_ids
        prompt = self.prompt(prompt)
        with self._turns:
            self.stats.finish_reason, self.stats.context_full = None, False
            logits = self.prefill(prompt, max_tokens=MAX_TOKENS.check(max_tokens), pin=pin, progress=progress)
            text = self._turns.begin()
            self._turns.take(text)
            token = sampler.choose(logits, self._sequence)
        count = answer_room(self.options.context or self.manifest.model.max_context, len(prompt), max_tokens)
        try:
            for left in reversed(range(count)):
                if token in stop_tokens:
                    self.stats.finish_reason = "stop"
                    return
                self._sequence.append(token)
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
                    token = sampler.choose(logits, self._sequence)
        finally:
            self._turns.over(text, self._save)

    def prefill(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        pin: int = 0,
        progress: Progress | None = None,
    ) -> Float:
        """Bring the cache to hold the prompt and return the logits after its last token [vocab_size] float32.

        Args:
            pin: the first so many tokens of the prompt are pinned, and no others; see :meth:`stream`.
        """
        prompt = self.prompt(prompt)
        with self._turns:
            self._turns.begin()
            return self._prefill(prompt, max_tokens, pin, progress)

    def reading(
        self, prompt: Sequence[int], *, max_tokens: int, pin: int = 0
    ) -> abc.Generator[tuple[int, int], None, Float]:
        """Do what :meth:`prefill` does, step by step, so that forks may go on between two steps.

        Yields (tokens done, tokens to do) after each step, and returns the logits.
        """
        prompt = self.prompt(prompt)
        with self._turns:
            self._turns.begin()
        steps = self._read(prompt, max_tokens, pin)
        while True:
            with self._turns:
                try:
                    done = next(steps)
                except StopIteration as end:
                    logits: Float = end.value
                    return logits
            yield done

    def _prefill(self, prompt: Sequence[int], max_tokens: int, pin: int, progress: Progress | None) -> Float:
        if progress is not None and not callable(progress):
            raise UsageError(f"progress must be a function of (tokens done, tokens to do), not {shown(progress)}")
        steps = self._read(prompt, max_tokens, pin)
        while True:
            try:
                done = next(steps)
            except StopIteration as end:
                logits: Float = end.value
                return logits
            if progress is not None:
                progress(*done)

    def _read(self, prompt: Sequence[int], max_tokens: int, pin: int) -> abc.Generator[tuple[int, int], None, Float]:
        PINNED.check(pin)
        if self.prepared is None:
            self._begin_with_prefix(prompt, TO_FOLLOW.check(max_tokens))
        self.prepare(len(prompt), max_tokens)
        assert self.prepared is not None
        text = self._turns.begin()
        reused = self._reuse(prompt)
        self.prepared.cache.pin(min(pin, len(prompt)))
        done, total = reused, len(prompt)
        self.stats.reused_tokens += reused
        last: Float | None = None
        if self._keeper is not None:
            self._keeper.began(self.prepared.cache, reused, total)
        while done < total:
            part = prompt[done : self._steps.next_stop(done, total, self.options.prefill_chunk)]
            started = self._machine.now()
            logits = self._run(part, "last" if done + len(part) == total else "none")
            self.stats.prefill_seconds += self._machine.now() - started
            self.stats.prefill_tokens += len(part)
            done += len(part)
            if done == total:
                last = logits[-1].copy()  # a fork may step meanwhile, whose logits stand where these do
            yield done - reused, total - reused
            self._turns.check(text)
        assert last is not None
        return last

    def step(self, tokens: Sequence[int]) -> Float:
        """Add tokens to the ``sequence`` and return the logits after the last one [vocab_size] float32.

        What the sequence has and the cache has not is computed before: the last token of an answer, say.

        Raises:
            UsageError: a token is not of the vocabulary, there is none, or more than ``prefill_chunk`` of them. NotFinite: the
                logits are not finite. Nothing was added.
        """
        with self._turns:
            if self.prepared is None:
                raise UsageError("there is no sequence to add to; call prefill() first")
            tokens, most = self._some(tokens), self.options.prefill_chunk
            if len(tokens) > most:
                raise UsageError(
                    f"step() adds 1..{most} tokens at a time (prefill_chunk), not {len(tokens)}; give prefill() the whole"
                    " sequence: it computes what is new"
                )
            self._turns.begin()
            self._catch_up()
            logits: Float = self._run(tokens, "last")[-1].copy()  # the engine writes the next ones where these stand
        return logits

    @staticmethod
    def step_together(generators: Sequence[Generator], tokens: Sequence[int]) -> Float:
        """Add one token to the sequence of each of these forks, in one step; see ``may_step_together``.

        Returns:
            logits [n, vocab_size] float32.

        Raises:
            EdgeKVError: as :meth:`step`; no token was added to any of them.
        """
        with contextlib.ExitStack() as turns:
            for generator in generators:
                turns.enter_context(generator._turns)
                generator._turns.begin()
                generator._catch_up()
            ids = [generator._some([token])[0] for generator, token in zip(generators, tokens, strict=True)]
            logits: Float = OneSequence._run_together(generators, ids).copy()
        return logits

    def score(self, tokens: Sequence[int]) -> Float:
        """Add tokens to the ``sequence`` and return the logits after each of them [T, vocab_size] (teacher forcing).

        Raises:
            UsageError: a token is not of the vocabulary, there is none, or the generator has a session.
        """
        if self.options.session is not None:
            raise UsageError("score() computes every token; use it without a session")
        tokens = self._some(tokens)
        with self._turns:
            self._turns.begin()
            steps = self._steps
            self.prepare(len(self._sequence) + len(tokens), 0)
            self._steps = steps  # a longer cache is a new one: what was in the sequence is computed again, in these
            self._catch_up()
            return np.concatenate(self._extend(tokens, "all"))

    def prompt(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens of a prompt as plain integers; an empty one begins with the token that begins a text.

        Raises:
            UsageError: one is not of the vocabulary, or the prompt is empty and the model has no such token.
        """
        prompt = self._ids(tokens)
        if not prompt:
            if self.manifest.model.bos_token_id is None:
                raise UsageError("the prompt is empty, and this model has no token that begins a text; write a prompt")
            prompt = [self.manifest.model.bos_token_id]
        return prompt

    def _ids(self, tokens: Sequence[int]) -> list[int]:
        """Check that tokens are numbers of the vocabulary, and return them as plain integers."""
        return token_row(tokens, most=self.manifest.model.vocab_size - 1)

    def _some(self, tokens: Sequence[int]) -> list[int]:
        ids = self._ids(tokens)
        if not ids:
            raise UsageError("there is no token to add; give at least one")
        return ids

    def _begin_with_prefix(self, prompt: Sequence[int], max_tokens: int) -> None:
        """Let a new sequence begin with a cached prefix, if one fits its prompt and a run without it gives the same bits."""
        options, manifest, keeper = self.options, self.manifest, self._keeper
        other_pages = options.allow_drop or options.kv == KVMode.FP16
        if other_pages or not options.prefixes or not (keeper is None or isinstance(keeper, SessionKeeper)):
            return
        if keeper is not None and (keeper.session.read_only is not None or keeper.session.tokens):
            return
        found = find_prefix(manifest, prompt, options.prefill_chunk, self.computed_by)
        if found is None:
            return
        path, tokens = found
        context = planned_context(options, manifest.model.max_context, len(prompt), max_tokens)
        in_session = keeper is not None
        if not plan_cache(manifest, self.kernels, options, context, in_session=in_session).compress_at_seal:
            self.stats.unused_prefix_tokens = tokens
            return
        self._keeper = with_prefix(keeper, path, options, manifest, self._machine)

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

    def rows_agree(self, most: int) -> bool:
        """Say whether up to so many sequences that step together get the same bits as alone; see :func:`rows_agree`."""
        dense = self._dense
        return isinstance(dense, Segments) and rows_agree(dense.engine, self.manifest.model, most)

    def rows_pay(self, most: int) -> bool:
        """Say whether up to so many sequences that step together take less time than in turn; see :func:`rows_pay`."""
        dense = self._dense
        return isinstance(dense, Segments) and rows_pay(dense.engine, self.manifest.model, most)

    @property
    def computed_by(self) -> str:
        """Engine and kernels: beside bundle, tokens and steps all that the bits of keys and values depend on."""
        return f"{self.engine}; {self.kernels.isa()}"

    @property
    def budget(self) -> BudgetPlan | None:
        """How the budget was divided, once a prompt gave the cache a size."""
        return self.prepared.plan if self.prepared is not None else None

    def prepare(self, prompt_tokens: int, max_tokens: int) -> BudgetPlan:
        """Make a cache for a prompt and what follows it, unless there is one that is long enough; return its budget.

        A sequence that becomes longer than its cache was made for starts over with a new one (or from its session); what was
        pruned stays pruned.

        Raises:
            PromptTooLong: the prompt leaves no room in it. BudgetError, StoreError: see :func:`prepare_cache`.
        """
        context = planned_context(
            self.options,
            self.manifest.model.max_context,
            TOKENS_SO_FAR.check(prompt_tokens),
            TO_FOLLOW.check(max_tokens),
        )
        with self._turns:
            if self.prepared is not None:
                if context <= self.prepared.context:
                    return self.prepared.plan
                self._turns.begin()
                self._save(whole=True)
                sequence, pruned = self._sequence, self._pruned_from(0)
                self._drop_cache()
                self._sequence, self._gone = sequence, pruned
            self.prepared = prepare_cache(
                self.manifest,
                self._dense,
                self.kernels,
                self.options,
                self._machine,
                context=context,
                kept=self._keeper.kept if self._keeper is not None else None,
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
            keeper.abandon()

    def _drop_cache(self) -> None:
        prepared, self.prepared = self.prepared, None
        self._begin_anew()
        if prepared is not None:
            prepared.close()

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
