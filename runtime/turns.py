"""Who may use a generator: one thread at a time, and of the texts that it has begun only the last goes on.

A generator has one sequence in its cache, and one set of buffers that all its forks share. A second user would read what the
first one writes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

from edgekv.errors import UsageError


class Turns:
    """The turns at one generator.

    Entered (``with turns:``) by whoever uses it, for as long as one call takes; again by the same thread, in a callback.

    Args:
        of: those of the generator that this one is a fork of: calls of the two exclude each other.

    Raises (when entered):
        UsageError: another thread is in a call, the generator was closed, or it belongs to the parent of this process.
    """

    def __init__(self, of: Turns | None = None) -> None:
        self._use: _Use = _Use() if of is None else of._use
        self._process = os.getpid()
        self._text: object = None  # the last that was begun
        self._thread: threading.Thread | None = None  # that took its last token, until it is over
        self._closed = False

    def __enter__(self) -> None:
        if os.getpid() != self._process:
            raise UsageError(
                "a forked process cannot use the generator of its parent, whose threads it does not have: open it after the fork"
            )
        if not self._use.lock.acquire(blocking=False):
            raise UsageError(
                "another thread is using this generator, or a fork of it; open one for each thread, or let them take turns"
            )
        if self._closed:
            self._use.lock.release()
            raise UsageError("this generator was closed; open the bundle again")
        self._use.depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._use.depth -= 1
        self._use.lock.release()

    def begin(self) -> object:
        """Let a text begin, and return what stands for it; the one before it does not go on.

        Raises:
            UsageError: the one before it is not over, and another thread takes its tokens.
        """
        if self._thread not in (None, threading.current_thread()) and self._thread.is_alive():
            raise UsageError(
                "another thread takes tokens from this generator; open a generator for each thread, or let it finish (or close"
                " its iterator) first"
            )
        self._text, self._thread = object(), None
        return self._text

    def check(self, text: object) -> None:
        """Refuse to go on with a text, after a callback too: what it called may have used the generator.

        Raises:
            UsageError: it is not the one in the cache any more, or the generator was closed.
        """
        self.check_open()
        if self._text is not text:
            raise UsageError(
                "this text cannot go on: its generator was given another one meanwhile. Finish one before the next, or give"
                " each its own cache with Generator.fork()"
            )

    def take(self, text: object) -> None:
        """Let this thread take the next token of a text.

        Raises:
            UsageError: see :meth:`check`.
        """
        self.check(text)
        self._thread = threading.current_thread()

    def over(self, text: object, last: Callable[[], None]) -> None:
        """Let no more tokens of a text be taken; ``last`` is called if its tokens are still those in the cache.

        It may come from the collector, at any moment and in any thread: in the middle of a call there is nothing to do.
        """
        mine = self._use.depth > 0 and self._use.lock.acquire(blocking=False)
        if mine:
            self._use.lock.release()
        if mine or self._text is not text or os.getpid() != self._process:
            return
        self._thread = None
        with self._use.lock:
            if self._text is text and not self._closed:
                last()

    def check_open(self) -> None:
        """Refuse to go on, in the middle of a long call, once another thread wants to close the generator.

        Raises:
            UsageError: it does.
        """
        if self._closed:
            raise UsageError("this generator was closed in the middle of a call")

    def close(self) -> None:
        """Let nobody in any more."""
        self._closed, self._thread = True, None

    def alone(self) -> AbstractContextManager[object]:
        """Return a context that begins when nobody is in a call, and in which nobody can begin one."""
        return self._use.lock


class _Use:
    """Who is in a call: this thread may enter again."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0
