"""The time of an emulated drive for pages that the kernels stream natively.

The bytes of a layer move as in a plain run, in one native call. What the device would have taken is computed from the plan of the
layer: its pieces pass through a ring as they do in ``native/records/stream.cpp``, request by request, each at its virtual time.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from edgekv.runtime.kernels.interface import Int64
from edgekv.runtime.storage.medium import most_on_the_way
from edgekv.runtime.storage.record import neighbours

from ..clock import Clock
from ..drive import EmulatedMedium
from .cost import Pieces, StepCost


class _Piece(NamedTuple):
    """Pages [start, stop) of a layer. ``reads``: bytes of each request for those that are on flash.

    ``first``, ``n_rows``: which rows of the plan they are. ``fetch_s``: what it costs the host to take them.
    """

    start: int
    stop: int
    first: int
    n_rows: int
    reads: tuple[int, ...]
    fetch_s: float


class _Ahead(NamedTuple):
    """A piece on its way: its place in the order of a step, when it is there, and what goes wrong with it."""

    at: int
    done_s: float
    faults: list[str]


class NativeWalk:
    """Prices the requests of the kernels' walk through the layers of a step.

    Args:
        ring: requests that its staging ring holds.
        fetched: called with how many pages came from flash.
    """

    def __init__(
        self,
        ring: int,
        medium: EmulatedMedium,
        clock: Clock,
        cost: StepCost,
        fetched: Callable[[int], None],
    ) -> None:
        self._medium = medium
        self._clock = clock
        self._cost = cost
        self._fetched = fetched
        self._layers: dict[int, list[_Piece]] = {}
        self._cut: dict[int, Pieces] = {}
        self._whole: Pieces | None = None
        self._order: list[_Piece] = []  # the pieces of a step that have something on flash
        self._begins: list[int] = []  # where a layer begins in it
        self._ahead: deque[_Ahead] = deque()
        self._free = ring
        self._most = most_on_the_way(ring)
        self._next = 0

    def plan(self, layer: int, stops: Int64, counts: Int64, pages: Int64, places: Int64) -> None:
        """Note what a layer consists of; see :meth:`~edgekv.runtime.kernels.interface.RecordStreams.plan`."""
        self.forget()
        size = self._cost.pages.record_bytes
        pieces, start, first = [], 0, 0
        for stop, count in zip(stops.tolist(), counts.tolist(), strict=True):
            runs = neighbours(places[first : first + count].tolist()) if count else ()
            reads = tuple((end - begin) * size for begin, end in runs)
            pieces.append(_Piece(start, stop, first, count, reads, self._cost.fetch(count)))
            start, first = stop, first + count
        self._layers[layer] = pieces
        self._cut[layer] = Pieces(np.array([piece.start for piece in pieces]), pages)
        self._whole = None

    def of(self, layer: int) -> Pieces:
        """Return how a layer is cut."""
        return self._cut[layer]

    def count(self, layer: int) -> int:
        """Return in how many pieces a layer is cut; one of which nothing is on flash is not."""
        return len(self._layers[layer]) or 1

    def whole(self) -> Pieces:
        """Return how all layers are cut, as one."""
        if self._whole is None:
            layers = sorted(self._layers)
            n_pages = max(self._layers[layer][-1].stop for layer in layers if self._layers[layer])
            starts = [self._cut[layer].starts if self._layers[layer] else [0] for layer in layers]
            self._whole = Pieces(
                np.concatenate([np.add(start, at * n_pages) for at, start in enumerate(starts)]),
                np.concatenate([self._cut[layer].cold + at * n_pages for at, layer in enumerate(layers)]),
            )
            self._order, self._begins = [], []
            for layer in layers:
                self._begins.append(len(self._order))
                self._order += [piece for piece in self._layers[layer] if piece.n_rows]
        return self._whole

    def pass_through(self, layer: int, attention_s: Sequence[float], *, heed: bool) -> int:
        """Let a layer take its time: each piece arrives, is taken, and is attended to in so many seconds.

        Args:
            heed: whether faults are met, or pass unseen.

        Returns:
            -1, or the row of the plan that a fault damaged.

        Raises:
            OSError: a read failed.
        """
        self.whole()
        at, clock = self._begins[layer], self._clock
        for piece, seconds in zip(self._layers[layer], attention_s, strict=True):
            if not piece.n_rows:
                clock.work(seconds)
                continue
            taken = self._take(at)
            clock.work(piece.fetch_s)
            if taken.done_s > clock.now:
                clock.wait_until(taken.done_s)
            self._fetched(piece.n_rows)
            if heed and "error" in taken.faults:
                self._free += 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self._fill()
            clock.work(seconds)
            self._free += 1
            if heed and "damage" in taken.faults:
                return piece.first + piece.n_rows - 1
            self._fill()
            at += 1
        return -1

    def _take(self, at: int) -> _Ahead:
        if self._ahead and self._ahead[0].at != at:
            self.forget()
        if not self._ahead:
            self._request(at)
        return self._ahead.popleft()

    def _fill(self) -> None:
        """Request what comes next, into the next step where this one ends, while there is room; nothing twice."""
        while self._free and self._on_the_way() < self._most and not (self._ahead and self._ahead[0].at == self._next):
            self._request(self._next)

    def _on_the_way(self) -> int:
        now = self._clock.now
        return sum(ahead.done_s > now for ahead in self._ahead)

    def _request(self, at: int) -> None:
        self._free -= 1
        now, medium, reads = self._clock.now, self._medium, self._order[at].reads
        done = max([medium.charge_read(now, size_bytes) for size_bytes in reads])
        self._ahead.append(_Ahead(at, done, [medium.draw() for _ in reads] if medium.faulty else []))
        self._next = (at + 1) % len(self._order)

    def forget(self) -> None:
        """Forget what was read ahead: the drive has worked for nothing."""
        self._free += len(self._ahead)
        self._ahead.clear()
