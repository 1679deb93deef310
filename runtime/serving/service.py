"""Answers many requests on one bundle: a queue, a few sequences at once, and one thread that gives each its turn.

In every round one of the prompts that are being read goes on by one step, and every answer that is being written by one token. So
a short request waits for a step of a long prompt, never for all of it.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgekv.bundle import Manifest
from edgekv.errors import EdgeKVError, EngineError, TooBusy, UsageError
from edgekv.settings import token_row
from edgekv.tiers import KVMode

from ..generate import Generator
from ..options import RunOptions, answer_room
from ..text import Text
from .answer import Answer
from .request import Deliver, Failed, Finished, Request

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServiceOptions:
    """How a bundle serves.

    Attributes:
        run: how each sequence runs; its budget is that of all of them together, its pages are INT8.
        parallel: sequences at once.
        queue: requests that may wait beside them.
    """

    run: RunOptions
    parallel: int = 2
    queue: int = 32


@dataclass(eq=False)
class _Asked:
    """A request, until it is over."""

    request: Request
    prompt: list[int]
    deliver: Deliver
    cancelled: bool = False


@dataclass(eq=False)
class _Seat:
    """A generator, and whom it answers now."""

    generator: Generator
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
        run = replace(options.run, kv=KVMode.INT8, prefixes=False)
        self._first = Generator.open(bundle, run)
        self._seats = [_Seat(self._first), *(_Seat(self._first.fork(run)) for _ in range(options.parallel - 1))]
        self._waiting: deque[_Asked] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._turn = itertools.count()
        self._thread = threading.Thread(target=self._serve, name="edgekv-serve", daemon=True)
        self._thread.start()

    @property
    def manifest(self) -> Manifest:
        """Of the bundle."""
        return self._first.manifest

    @property
    def text(self) -> Text:
        """The tokenizer and chat template of the bundle; for one thread at a time, beside the service's own."""
        return self._first.text

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
        prompt = token_row(request.tokens, most=self.manifest.model.vocab_size - 1)
        if not prompt:
            if self.manifest.model.bos_token_id is None:
                raise UsageError("the prompt is empty, and this model has no token that begins a text; write a prompt")
            prompt = [self.manifest.model.bos_token_id]
        answer_room(self.context, len(prompt), self.context if request.max_tokens is None else request.max_tokens)
        asked = _Asked(request, prompt, deliver)
        with self._changed:
            if self._closing:
                raise UsageError("this service was closed")
            if len(self._waiting) >= self.options.queue:
                raise TooBusy(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.append(asked)
            self._changed.notify()

        def cancel() -> None:
            asked.cancelled = True

        return Ticket(cancel)

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
                    self._changed.wait()
                closing = self._closing
            if closing:
                break
            self._admit()
            self._round()
        for asked in [*self._waiting, *(seat.asked for seat in self._seats if seat.asked is not None)]:
            asked.cancelled = True
        self._admit()
        self._round()
        for seat in reversed(self._seats):
            seat.generator.close()

    def _busy(self) -> Sequence[_Seat]:
        return [seat for seat in self._seats if seat.answer is not None]

    def _admit(self) -> None:
        """Seat those who wait, in their order."""
        while True:
            with self._changed:
                for asked in [asked for asked in self._waiting if asked.cancelled]:
                    self._waiting.remove(asked)
                    asked.deliver(Finished("cancelled", len(asked.prompt), 0, 0))
                free = [seat for seat in self._seats if seat.answer is None]
                if not free or not self._waiting:
                    return
                asked = self._waiting.popleft()
            seat = free[0]
            try:
                seat.answer, seat.asked = Answer(asked.request, asked.prompt, seat.generator, asked.deliver), asked
            except EdgeKVError as error:
                asked.deliver(Failed(error))

    def _round(self) -> None:
        reading = [seat for seat in self._busy() if seat.answer is not None and not seat.answer.writing]
        if reading:
            self._advance(reading[next(self._turn) % len(reading)], Answer.read)
        for seat in self._busy():
            if seat.answer is not None and seat.answer.writing:
                self._advance(seat, Answer.write)

    def _advance(self, seat: _Seat, step: Callable[[Answer], None]) -> None:
        answer, asked = seat.answer, seat.asked
        assert answer is not None
        assert asked is not None
        try:
            if asked.cancelled:
                answer.cancel()
            elif not answer.over:
                step(answer)
        except Exception as error:
            _log.exception("an answer ended with an error that is a bug")
            answer.fail(
                EngineError(f"the answer ended with an error of edgekv itself: {type(error).__name__}; see its log")
            )
        if answer.over:
            seat.answer = seat.asked = None
