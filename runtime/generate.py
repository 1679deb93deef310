"""Open a bundle and generate: the loop that everything else serves.

with Generator.open("llama.edgekv", kv_budget="64MiB") as generator:
    for piece in generator.stream("Once upon a time", max_tokens=100):
        print(piece, end="")
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from edgekv.bundle import Manifest, check_files, read_manifest
from edgekv.errors import UsageError
from edgekv.runtime.attend import Attender
from edgekv.runtime.budget import BudgetPlan, plan_budget
from edgekv.runtime.cache import KVCache
from edgekv.runtime.embedding import Embedding
from edgekv.runtime.engines.base import Float, InlineEngine, SegmentEngine
from edgekv.runtime.engines.choose import open_inline, open_segments
from edgekv.runtime.forward import Forward, Rows, SplitForward
from edgekv.runtime.governor import Governor, Level, Reclaim
from edgekv.runtime.kernels import Kernels, load_kernels
from edgekv.runtime.machine import HOST, Machine
from edgekv.runtime.options import RunOptions as RunOptions
from edgekv.runtime.options import attend_options, check_length, open_offload, planned_context, verified_stamp
from edgekv.runtime.options import cache_home as cache_home
from edgekv.runtime.options import default_threads as default_threads
from edgekv.runtime.policy import CacheOptions, make_policy
from edgekv.runtime.rope import Rope
from edgekv.runtime.sampling import Sampler, SamplingOptions
from edgekv.runtime.session import Session, common_prefix
from edgekv.runtime.session_keeper import SessionKeeper, with_prefix
from edgekv.runtime.stats import RunStats
from edgekv.runtime.store import PageStore
from edgekv.runtime.text import Text, TextStream
from edgekv.types import KVMode


class Generator:
    """A bundle that is ready to generate, with the cache of one sequence.

    Tokens that stay in the cache are not computed again: a prompt that begins like the last one (a conversation)
    only pays for what is new.
    """

    def __init__(self, folder: Path, options: RunOptions, machine: Machine = HOST) -> None:
        self._machine = machine
        started = machine.now()
        self.folder = folder
        self.options = options
        self.manifest: Manifest = read_manifest(folder)
        check_files(folder, self.manifest, stamp=verified_stamp(folder))
        self.kernels: Kernels = load_kernels()
        self._policy = make_policy(options.policy)
        self._attend = attend_options(options, self.manifest.form)
        self._tokens: list[int] = []
        self._forward: Forward | None = None
        self._cache: KVCache | None = None
        self._store: PageStore | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._engine: SegmentEngine | None = None
        self._inline: InlineEngine | None = None
        self._attender: Attender | None = None
        self._governor: Governor | None = None
        self._planned_context = 0
        self._keeper = self._open_session()  # first: a wrong or a locked one is refused before anything is loaded
        if self.manifest.form == "split":
            threads, own = options.threads, options.own_process
            engine = open_segments(folder, self.manifest, threads, cache_home(), own_process=own)
            self._engine = machine.segments(engine, self.manifest)
            assert self.manifest.embedding is not None
            self._embedding = Embedding(folder, self.manifest.embedding, self.manifest.model)
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
        other._policy = make_policy(options.policy)
        other._attend = attend_options(options, self.manifest.form)
        other._tokens = []
        other._forward = other._cache = other._store = other._scratch = None
        other._attender = other._governor = None
        other._planned_context = 0
        other._keeper = other._open_session()
        return other

    @functools.cached_property
    def text(self) -> Text:
        """The tokenizer, loaded when it is first needed: who brings tokens does without its memory.

        Raises:
            BundleError: it cannot be read.
        """
        template = self.manifest.chat_template
        return Text(self.folder / "tokenizer.json", self.folder / template if template else None)

    # -- the session -------------------------------------------------------------------------------------------

    @property
    def session(self) -> Session | None:
        """The session that keeps the sequence, if one was asked for, or the prefix that it begins with."""
        return self._keeper.session if self._keeper is not None else None

    def save(self, *, whole: bool = False) -> None:
        """Write a checkpoint of the session now; ``whole`` includes the page that is not full yet."""
        if self._keeper is not None and self._cache is not None:
            self._keeper.save(self._cache, self._tokens, whole=whole)

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
        stop: Sequence[str] = (),
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[str]:
        """Generate text, piece by piece.

        Args:
            prompt: text, or tokens.
            progress: called during prefill with (tokens done, tokens to do).

        Raises:
            PromptTooLong: the prompt and max_tokens exceed the context. BudgetError: the budget is too small.
            OutOfPages, StoreError: no room, or flash failed; the text so far is right.
        """
        tokens = self.text.encode(prompt) if isinstance(prompt, str) else list(prompt)
        stream = TextStream(self.text, stop)
        for token in self.tokens(tokens, max_tokens=max_tokens, sampling=sampling, progress=progress):
            yield stream.push(token)
            if stream.stopped:
                return
        yield stream.flush()

    def tokens(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 256,
        sampling: SamplingOptions | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[int]:
        """Generate tokens; ends at ``max_tokens`` or before an end-of-sequence token. See :meth:`stream`."""
        sampler = Sampler(sampling or SamplingOptions())
        stop_tokens = self.manifest.model.eos_token_ids
        logits = self.prefill(prompt, max_tokens=max_tokens, progress=progress)
        sequence = list(prompt)
        try:
            for count in range(max_tokens):
                token = sampler.choose(logits, sequence)
                if token in stop_tokens:
                    return
                sequence.append(token)
                if self._keeper is not None:
                    self._keeper.sequence = sequence
                yield token
                if count + 1 == max_tokens:
                    return
                started = self._machine.now()
                logits = self.step([token])
                self.stats.decode_seconds += self._machine.now() - started
                self.stats.decode_tokens += 1
        finally:
            self.save()

    def prefill(
        self, prompt: Sequence[int], *, max_tokens: int, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Float:
        """Bring the cache to hold the prompt and return the logits after its last token [vocab_size] float32."""
        prompt = prompt or [self.manifest.model.bos_token_id or 0]
        fresh, machine = self._cache is None, self._machine
        self._keeper = with_prefix(self._keeper, self.options, self.manifest, prompt, fresh=fresh, machine=machine)
        self._make_cache(len(prompt), max_tokens)
        reused = self._reuse(prompt)
        started = self._machine.now()
        done, total = reused, len(prompt)
        chunk = self.options.prefill_chunk
        logits = None
        if self._keeper is not None:
            self._keeper.began(reused, total)
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
        """Add tokens and return the logits after the last one."""
        logits: Float = self._run(tokens, "last")[-1]
        return logits

    def score(self, tokens: Sequence[int]) -> Float:
        """Add tokens and return the logits after each of them [T, vocab_size] (teacher forcing); not with a session."""
        if self._keeper is not None:
            raise UsageError("score() computes every token; use it without a session")
        self._make_cache(len(self._tokens) + len(tokens), 0)
        parts = []
        for start in range(0, len(tokens), self.options.prefill_chunk):
            parts.append(self._run(tokens[start : start + self.options.prefill_chunk], "all").copy())
        return np.concatenate(parts)

    def _run(self, tokens: Sequence[int], rows: Rows) -> Float:
        assert self._forward is not None and self._cache is not None and self._governor is not None  # noqa: PT018
        self._governor.between_steps()
        start = len(self._tokens)
        check_length(self.options, self.manifest.model.max_context, start + len(tokens))
        try:
            positions = np.arange(start, start + len(tokens), dtype=np.int64)
            logits = self._forward.step(np.asarray(tokens, np.int64), positions, rows)
        except BaseException:
            # A step that failed half way leaves some layers longer than others: back to what all of them hold.
            kept = self._cache.truncate(start)
            del self._tokens[kept:]
            raise
        self._tokens.extend(int(token) for token in tokens)
        if self._keeper is not None:
            self._keeper.stepped(start, self._cache, self._tokens)
        return logits

    def _reuse(self, prompt: Sequence[int]) -> int:
        """Cut the cache to the longest common prefix; at least the last token is computed again, for its logits."""
        assert self._cache is not None
        if self._keeper is not None:
            restored = self._keeper.restore(self._cache, prompt)
            if restored is not None:
                self._tokens = restored
        common = common_prefix(self._tokens, prompt[:-1])
        if common < len(self._tokens):
            common = self._cache.truncate(common)
            del self._tokens[common:]
        return common

    # -- memory ------------------------------------------------------------------------------------------------

    @property
    def cache(self) -> KVCache | None:
        """The cache of the sequence, once a prompt gave it a size."""
        return self._cache

    @property
    def engine(self) -> str:
        """What computes the dense parts, for messages."""
        engine = self._engine or self._inline
        return engine.description if engine is not None else self.manifest.engine

    @property
    def budget(self) -> BudgetPlan | None:
        """How the budget was divided, once a prompt gave the cache a size."""
        return self._plan if self._cache is not None else None

    def _make_cache(self, prompt_tokens: int, max_tokens: int) -> None:
        model = self.manifest.model
        context = planned_context(self.options, model.max_context, prompt_tokens, max_tokens)
        if self._cache is not None:
            if context <= self._planned_context:
                return
            # Longer than what the cache was sized for: start over (stats show what was reused: nothing, or the session).
            self.save(whole=True)
            self._drop_cache()
        self._planned_context = context
        spec = model.pages(self.manifest.page_size)
        self._plan = plan_budget(
            spec, kv_budget=self.options.kv_budget, context=context, run_pages=self.kernels.RUN_PAGES,
            mode=self.options.kv if self._keeper is None else KVMode.INT8,
            inline=self.manifest.form == "inline", selective=self._attend.selective,
        )  # fmt: skip
        if self._keeper is not None:
            self._store = self._keeper.session.store
        elif not self._plan.fits and (self.options.offload is not None or not self.options.allow_drop):
            self._store, self._scratch = open_offload(self.options, spec, self._machine.medium)
        options = CacheOptions(
            budget_bytes=self._plan.arena_bytes, compress_at_seal=self._plan.compress_at_seal,
            allow_drop=self.options.allow_drop, policy=self._policy,
            merge_layers=frozenset(at for at, window in enumerate(model.windows) if not (window or self._keeper)),
        )  # fmt: skip
        self._cache = KVCache(spec, options, self.kernels, self._store, max_pages=-(-context // spec.page_size))
        self._machine.watch(self._cache, self._plan, self._abandon_session)
        if self.manifest.form == "inline":
            from edgekv.runtime.inline import InlineForward

            if self._inline is None:
                threads, own = self.options.threads, self.options.own_process
                inline = open_inline(self.folder, self.manifest, threads, cache_home(), own_process=own)
                self._inline = self._machine.inline(inline, self.manifest)
            self._forward = InlineForward(self._inline, model, self._cache)
        else:
            assert self._engine is not None
            self._attender = Attender(
                model, self._cache, self.kernels, threads=self.options.threads, executor=self._engine.executor,
                max_tokens=self.options.prefill_chunk,
                piece_pages=self._plan.piece_pages, ring_pieces=self._plan.ring_pieces,
                attend=self._attend, machine=self._machine,
            )  # fmt: skip
            self._forward = SplitForward(self._engine, self._embedding, Rope(model.rope), self._cache, self._attender)
        self._governor = Governor(self._cache.manager, self._plan, context, self.options, self._machine, self._attender)

    def set_budget(self, kv_budget: int | str) -> Reclaim | None:
        """Change the KV budget, between two tokens; see :meth:`Governor.set_budget`. Before the first prompt: None."""
        self.options = replace(self.options, kv_budget=kv_budget) if self._governor is None else self.options
        return self._governor.set_budget(kv_budget) if self._governor is not None else None

    def on_pressure(self, level: Level | str) -> Reclaim | None:
        """Tell, between two tokens, how short memory is; see :meth:`Governor.on_pressure`."""
        return self._governor.on_pressure(Level(level)) if self._governor is not None else None

    def report(self) -> RunStats:
        """Return the counters of the run, with what the cache holds now and the peak RSS of the process."""
        self.stats.peak_rss_bytes = self._machine.peak_rss_bytes()
        if self._cache is not None:
            self.stats.cache = replace(self._cache.use(), budget_bytes=self._plan.budget_bytes)
            self.stats.pages = self._cache.manager.counters
            self.stats.selection = self._attender.selection.summary() if self._attender is not None else None
            self.stats.pressure = self._governor.stats if self._governor is not None else None
            if self._cache.manager.store is not None:
                self.stats.count(self._cache.manager.store.counters)
        return self.stats

    def close(self) -> None:
        """Save and close the session, if there is one, and free the cache and the offload file.

        Raises:
            StoreError: the session could not be saved; everything is free nevertheless.
        """
        try:
            self.save(whole=True)
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
        if self._attender is not None:
            self._attender.close()
            self._attender = None
        if self._governor is not None:
            self._governor.close()
            self._governor = None
        self._forward = None
        self._cache = None
        self._tokens = []
        if self._store is not None and self._keeper is None:
            self._store.close()
        self._store = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
