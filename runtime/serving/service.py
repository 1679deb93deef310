"""Answers many requests on one bundle: a queue, a few sequences at once, and one thread that gives each its turn.

In every round one of the prompts that are being read goes on by one step, and every answer that is being written by one token. So
a short request waits for a step of a long prompt, never for all of it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgekv.bundle import Manifest, read_manifest
from edgekv.errors import BudgetError, EdgeKVError, EngineError, TooBusy, UsageError
from edgekv.files import make_folder
from edgekv.scratch import ScratchFolder
from edgekv.settings import MAX_WRITE_PER_DAY
from edgekv.tiers import KVMode, Together

from ..generate import Generator
from ..options import RunOptions, answer_room
from ..pages.budget import resolve_budget
from ..system.process import cache_home, peak_rss_bytes
from ..text import Text
from .answer import Answer
from .keeper import LibraryKeeper
from .library import Library
from .request import Deliver, Event, Failed, Finished, Piece, Reading, Request
from .snapshot import Counts, Snapshot, by_tier, sequence_facts

#: Tokens of a sequence at the most, where nothing else is said.
DEFAULT_CONTEXT = 8192
#: What requests left is made durable when nothing else is to be done, and after so long at the latest.
COMMIT_S = 2.0
#: So often it is seen anew what the service is doing.
LOOK_S = 0.2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServiceOptions:
    """How a bundle serves.

    Attributes:
        run: how each sequence runs; its budget is that of all of them together, its pages are INT8.
        parallel: sequences at once; they share the budget evenly.
        queue: requests that may wait beside them.
        cache_dir: keeps what requests leave behind, across restarts, up to ``cache_limit_bytes``; None: nothing is kept beyond
            the sequences in RAM. secret: encrypts it.
        together: whether answers that are written at once share a step.
        exact: every answer is, to the bit, that of a run of its own. Without it the next turn of a conversation goes on
            from the keys and values of the answer before, as a session does, where such a run reads all of it as a prompt.
    """

    run: RunOptions
    parallel: int = 2
    queue: int = 32
    cache_dir: Path | None = None
    cache_limit_bytes: int = 8 * 1024**3
    secret: bytes | None = None
    together: Together = Together.AUTO
    exact: bool = False


@dataclass(eq=False)
class _Asked:
    """A request, until it is over."""

    request: Request
    prompt: list[int]
    deliver: Deliver
    cancelled: bool = False


@dataclass(eq=False)
class _Seat:
    """A generator, and whom it answers now.

    ``used``: when it was given to a request last; ``reused``: tokens of that one's prompt that were in the cache.
    """

    generator: Generator
    keeper: LibraryKeeper
    used: int = 0
    reused: int = 0
    asked: _Asked | None = None
    answer: Answer | None = None


class Ticket:
    """A request that was taken."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel

    def cancel(self) -> None:
        """Let it end within one step; it is told as finished, ``cancelled``. May be called from any thread, at any time."""
        self._cancel()


class Service:
    """A bundle that answers requests, on a thread of its own.

    Raises (from the constructor):
        BundleError, EngineError, UsageError, StoreError: see :meth:`Generator.open`.
    """

    def __init__(self, bundle: Path, options: ServiceOptions) -> None:
        self.options = options
        manifest = read_manifest(bundle)
        context = options.run.context or min(manifest.model.max_context, DEFAULT_CONTEXT)
        budget = resolve_budget(options.run.kv_budget, manifest.model.pages(manifest.page_size), context)
        run = replace(
            options.run,
            kv=KVMode.INT8,
            prefixes=False,
            context=context,
            kv_budget=budget // options.parallel if budget is not None else None,
            offload=None,
        )
        self._release = contextlib.ExitStack()
        try:
            self._first = self._release.enter_context(Generator.open(bundle, run))
            self._library = self._open_library(manifest)
            self._release.callback(self._library.close)
            self._seats = [self._seat(run) for _ in range(options.parallel)]
            self._together = options.parallel > 1 and self._may_write_together()
        except BaseException:
            self._release.close()
            raise
        self._waiting: deque[_Asked] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._turn = itertools.count()
        self._counts = Counts()
        self._look = 0.0
        self._snapshot = self._facts()
        self._thread = threading.Thread(target=self._serve, name="edgekv-serve", daemon=True)
        self._thread.start()

    def _open_library(self, manifest: Manifest) -> Library:
        options, folder = self.options, self.options.cache_dir
        if folder is None or not options.cache_limit_bytes:
            beside = cache_home() / "serve"
            make_folder(beside)
            folder = self._release.enter_context(ScratchFolder(beside, "run-")).path
        return Library(
            folder,
            manifest,
            self._first.computed_by,
            chunk=options.run.prefill_chunk,
            exact=options.exact,
            limit_bytes=options.cache_limit_bytes if options.cache_dir is not None else 0,
            secret=options.secret,
            max_bytes_per_day=MAX_WRITE_PER_DAY.optional(options.run.max_write_per_day),
        )

    def _may_write_together(self) -> bool:
        mode, most = self.options.together, self.options.parallel
        if mode == Together.AUTO:
            return self._first.rows_agree(most) and self._first.rows_pay(most)
        return mode == Together.ALWAYS

    def _seat(self, run: RunOptions) -> _Seat:
        keeper = LibraryKeeper(self._library)
        generator = self._release.enter_context(self._first.fork(run, keeper))
        try:
            generator.prepare(1, 1)
        except BudgetError as error:
            raise BudgetError(
                f"{self.options.parallel} sequences share the budget (--parallel), and for one {error}"
            ) from error
        return _Seat(generator, keeper)

    @property
    def manifest(self) -> Manifest:
        """Of the bundle."""
        return self._first.manifest

    @property
    def text(self) -> Text:
        """The tokenizer and chat template of the bundle; one thread may use them beside the service's own."""
        return self._first.text

    @property
    def writes_together(self) -> bool:
        """Whether the next tokens of several answers are computed in one step."""
        return self._together

    @property
    def context(self) -> int:
        """Tokens of a sequence at the most."""
        return self._first.options.context or self.manifest.model.max_context

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Take a request; what comes of it is told to ``deliver``, on the thread of the service.

        Raises:
            UsageError: a token is not of the vocabulary; the service is closed. PromptTooLong: the prompt leaves no room in
                the context. TooBusy: the queue is full.
        """
        prompt = self._first.prompt(request.tokens)
        answer_room(self.context, len(prompt), self.context if request.max_tokens is None else request.max_tokens)
        asked = _Asked(request, prompt, deliver)
        with self._changed:
            if self._closing:
                raise UsageError("this service was closed")
            free = len(self._seats) - len(self._busy())
            if len(self._waiting) >= self.options.queue + free:
                raise TooBusy(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.append(asked)
            self._changed.notify()

        def cancel() -> None:
            asked.cancelled = True

        return Ticket(cancel)

    def snapshot(self) -> Snapshot:
        """Return what the service is doing; not older than a fifth of a second, or a step of it."""
        return self._snapshot

    def close(self) -> None:
        """Cancel what is under way, keep what can be kept, and free everything."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # -- the thread ------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._busy() or self._closing):
                    if self._library.waits_s is not None:
                        break
                    self._changed.wait()
                closing = self._closing
            if closing:
                break
            self._admit()
            if self._busy():
                self._round()
            if not self._busy() or (self._library.waits_s or 0) > COMMIT_S:
                self._library.commit()
            if not self._busy() or time.monotonic() - self._look > LOOK_S:
                self._snapshot = self._facts()
        for asked in [*self._waiting, *(seat.asked for seat in self._seats if seat.asked is not None)]:
            asked.cancelled = True
        self._admit()
        for seat in self._busy():
            self._advance(seat, Answer.write)
        for seat in self._seats:
            seat.keeper.leave()
        self._release.close()

    def _facts(self) -> Snapshot:
        self._look = time.monotonic()
        sequences = tuple(
            sequence_facts(
                seat.generator.cache,
                "idle" if seat.answer is None else "writing" if seat.answer.writing else "reading",
                seat.reused,
            )
            for seat in self._seats
        )
        library, counts = self._library, self._counts
        pages, sizes = by_tier(sequences, library.spec)
        plans = [seat.generator.budget for seat in self._seats]
        return Snapshot(
            waiting=len(self._waiting),
            parallel=len(self._seats),
            context=self.context,
            page_size=library.spec.page_size,
            budget_bytes=sum(plan.budget_bytes for plan in plans if plan is not None),
            peak_rss_bytes=peak_rss_bytes(),
            sequences=sequences,
            pages_by_tier=pages,
            bytes_by_tier=sizes,
            cache_bytes=library.used_bytes,
            cache_limit_bytes=library.limit_bytes,
            cache_entries=library.tree.size,
            requests=dict(counts.requests),
            prompt_tokens=counts.prompt_tokens,
            reused_tokens=counts.reused_tokens,
            generated_tokens=counts.generated_tokens,
            flash_bytes_read=library.store.counters.bytes_read,
            flash_bytes_written=library.store.counters.bytes_written,
        )

    def _count(self, event: Event, seat: _Seat) -> None:
        counts = self._counts
        if isinstance(event, Reading):
            seat.reused = event.reused
        elif isinstance(event, Piece):
            counts.generated_tokens += len(event.tokens)
        elif isinstance(event, Finished):
            counts.requests[event.reason] += 1
            counts.prompt_tokens += event.prompt_tokens
            counts.reused_tokens += event.cached_tokens
        else:
            counts.requests["failed"] += 1

    def _busy(self) -> Sequence[_Seat]:
        return [seat for seat in self._seats if seat.answer is not None]

    def _admit(self) -> None:
        """Seat those who wait, in their order."""
        while True:
            with self._changed:
                for asked in [asked for asked in self._waiting if asked.cancelled]:
                    self._waiting.remove(asked)
                    self._counts.requests["cancelled"] += 1
                    asked.deliver(Finished("cancelled", 0, 0, 0))
                free = [seat for seat in self._seats if seat.answer is None]
                if not free or not self._waiting:
                    return
                asked = self._waiting.popleft()
            self._begin(asked, free)

    def _begin(self, asked: _Asked, free: Sequence[_Seat]) -> None:
        """Give a request the seat that has most of its prompt in RAM, or the one that was not used for longest."""
        owner, prompt = asked.request.owner, asked.prompt
        in_ram = [(seat.keeper.reuse(owner, prompt), seat) for seat in free]
        most = max(count for count, _ in in_ram)
        if most < self._library.find(owner, prompt).count:
            most = 0
        fitting = [seat for count, seat in in_ram if not most or count == most]
        seat = min(fitting, key=lambda seat: seat.used)
        seat.used = next(self._turn)
        seat.keeper.ask(owner)

        def deliver(event: Event) -> None:
            self._count(event, seat)
            asked.deliver(event)

        try:
            seat.answer, seat.asked = Answer(asked.request, prompt, seat.generator, deliver), asked
        except EdgeKVError as error:
            asked.deliver(Failed(error))

    def _round(self) -> None:
        reading = [seat for seat in self._busy() if seat.answer is not None and not seat.answer.writing]
        if reading:
            self._advance(reading[next(self._turn) % len(reading)], Answer.read)
        writing = [seat for seat in self._busy() if seat.answer is not None and seat.answer.writing]
        for seat in writing if len(writing) < 2 or not self._together else self._write_together(writing):
            self._advance(seat, Answer.write)

    def _write_together(self, writing: Sequence[_Seat]) -> Sequence[_Seat]:
        """Run the next tokens of several answers in one step; returns the seats whose answers must go on alone."""
        ready = [seat for seat in writing if seat.asked is not None and not seat.asked.cancelled]
        ready = [seat for seat in ready if seat.generator.may_step_together]
        answers = [seat.answer for seat in ready if seat.answer is not None]
        if len(ready) < 2:
            return writing
        try:
            logits = Generator.step_together([seat.generator for seat in ready], [answer.token for answer in answers])
        except EdgeKVError:  # of one of them: alone it says which
            return writing
        for seat, row in zip(ready, logits, strict=True):
            self._advance(seat, functools.partial(Answer.take, logits=row))
        return [seat for seat in writing if seat not in ready]

    def _advance(self, seat: _Seat, step: Callable[[Answer], None]) -> None:
        answer, asked = seat.answer, seat.asked
        assert answer is not None
        assert asked is not None
        try:
            if asked.cancelled:
                answer.cancel()
            elif not answer.over:
                step(answer)
        except EdgeKVError as error:  # such as of a constraint
            answer.fail(error)
        except Exception as error:
            _log.exception("an answer ended with an error that is a bug")
            answer.fail(
                EngineError(f"the answer ended with an error of edgekv itself: {type(error).__name__}; see its log")
            )
        if answer.over:
            if answer.ended:
                seat.keeper.end_turn()
            seat.answer = seat.asked = None
