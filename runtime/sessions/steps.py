"""In which steps the tokens of a sequence were computed, so that they are cut and computed again at the same places.

Floating point depends on how tokens are cut into steps: tokens of one step see each other as they are computed, earlier ones as
their pages hold them. So the cuts follow from tokens and options alone, never from what is saved, cached, on flash or resumed:

- A prompt is cut at the multiples of the chunk, counted from the beginning of the sequence; generated tokens are steps of one.
- A sequence is cut back only to where a step began and its cache can be cut whatever tier its pages are in: at a page
  boundary, or inside the page that is still open.
- What has to be computed again is computed in the steps of the first time.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence


class Steps:
    """The steps of one sequence. Those that a session remembers, and a run has not repeated yet, are among them.

    Attributes:
        end: tokens in all steps.
    """

    def __init__(self, page_size: int, starts: Sequence[int] = (), end: int = 0) -> None:
        self._page_size = page_size
        self._starts = list(starts)
        self.end = end

    def add(self, start: int, stop: int) -> None:
        """Tokens [start, stop) were computed in one step, behind the others or again."""
        if start < self.end and self._following(start) == stop:
            return
        self.cut(start)
        self._starts.append(start)
        self.end = stop

    def next_stop(self, done: int, total: int, chunk: int) -> int:
        """Return where the step of a prompt of ``total`` tokens ends that begins at ``done``."""
        return min(self._following(done) if done < self.end else (done // chunk + 1) * chunk, total)

    def _following(self, done: int) -> int:
        at = bisect.bisect_right(self._starts, done)
        return self._starts[at] if at < len(self._starts) else self.end

    def keep(self, position: int, n_slots: int | None = None) -> int:
        """Return how many tokens stay when those from ``position`` on go.

        Args:
            n_slots: how many are in the cache now, whose last page is open; None: all of the steps.
        """
        n_slots = self.end if n_slots is None else n_slots
        if position >= self.end:
            return self.end
        for at in range(bisect.bisect_right(self._starts, position) - 1, -1, -1):
            start = self._starts[at]
            if start % self._page_size == 0 or start // self._page_size == n_slots // self._page_size:
                return start
        return 0

    def cuts(self, start: int, stop: int) -> tuple[int, ...]:
        """Return where the steps of tokens [start, stop) begin and the last of them ends: what their bits depend on."""
        first = bisect.bisect_right(self._starts, start) - 1
        behind = bisect.bisect_left(self._starts, stop)
        return (*self._starts[first:behind], self._starts[behind] if behind < len(self._starts) else self.end)

    def cut(self, position: int) -> None:
        """Forget the steps that begin at ``position`` or later; one that goes beyond it ends there."""
        del self._starts[bisect.bisect_left(self._starts, position) :]
        self.end = min(self.end, position)

    def lengths(self) -> tuple[int, ...]:
        """Return the steps as numbers to store: length, how many of it in a row, length, how many..."""
        stops = itertools.pairwise([*self._starts, self.end])
        runs = itertools.groupby(stop - start for start, stop in stops)
        return tuple(itertools.chain.from_iterable((length, len(list(run))) for length, run in runs))

    @classmethod
    def of_lengths(cls, page_size: int, lengths: Sequence[int]) -> Steps:
        """Return the steps that :meth:`lengths` wrote."""
        runs = zip(lengths[::2], lengths[1::2], strict=True)
        every = list(itertools.chain.from_iterable([length] * count for length, count in runs))
        *starts, end = itertools.accumulate(every, initial=0)
        return cls(page_size, starts, end)
