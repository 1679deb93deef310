"""How a command ends when it is asked to: Ctrl-C, SIGTERM, or a terminal that is closed.

A run is asked between two tokens, where what was printed and what a session holds are the same text. A command that does
something else, or a token that takes longer than ``PATIENCE_S``, is interrupted where it is.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Seconds that a step may go on after a signal, before it is interrupted inside.
PATIENCE_S = 0.5
#: From so many seconds after the first one on, a second signal ends the process at once. (`timeout` sends two together.)
IMPATIENCE_S = 1.0
#: Seconds from a destructor that lost the interruption to the next try.
AGAIN_S = 0.002

#: What is watched, and how the line begins that says so.
_WATCHED = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "ended by SIGTERM",
    signal.SIGHUP: "ended, since the terminal was closed",
}


class Interrupted(SystemExit):
    """A signal asked the command to end.

    Attributes:
        note: what the user should know: what was saved.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.note = ""

    def __str__(self) -> str:
        return _WATCHED[signal.Signals(self.number)] + (f"; {self.note}" if self.note else "")


class Signals:
    """The signals that this process was sent; one that is ignored (as under nohup) stays so."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._since = 0.0
        self._waits = self._done = self._lost = False

    def watch(self) -> None:
        """Raise :class:`Interrupted` from now on when a signal comes."""
        self._report, sys.unraisablehook = sys.unraisablehook, self._unraised
        for number in _WATCHED:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._came)
        signal.signal(signal.SIGALRM, self._overdue)

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal came that nobody has seen yet."""
        if self._number is not None:
            self._wait(False)
            raise Interrupted(self._number)

    def forget(self) -> None:
        """Go on after a signal: it is dealt with."""
        self._number = None

    def end(self) -> None:
        """Say that the command is done: :meth:`check` for the last time; what comes now is too late."""
        self.check()
        self._done = True

    @contextmanager
    def between_tokens(self) -> Iterator[None]:
        """Let signals wait in this block until it calls :meth:`check`."""
        self._wait(True)
        try:
            yield
        finally:
            self._wait(False)
        self.check()

    def _wait(self, waits: bool) -> None:
        self._waits = waits
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _came(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._done:
            return
        if self._number is not None:
            if now - self._since > IMPATIENCE_S:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self._number, self._since = number, now
        if not self._waits:
            raise Interrupted(number)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)

    def _overdue(self, number: int, frame: FrameType | None) -> None:
        if self._waits or self._lost:
            self._lost = False
            self.check()

    def _unraised(self, lost: sys.UnraisableHookArgs) -> None:
        """Take what was raised in a destructor or a weak reference's callback, from where nothing gets out."""
        if lost.exc_type is not Interrupted:
            self._report(lost)
        elif not self._done:
            self._lost = True
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
