"""The time of a step of one token, charged for all layers at once.

None of its pages moves before every layer has attended, so what each layer costs is known from the page table. A few lines of
Python between two layers cost far more than they seem to, since the layer's weights have just driven them out of the
processor's caches; in one loop they cost next to nothing. The virtual times are those of charging layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgekv.runtime.kernels.interface import PAGE_REF, Refs

from ..clock import Clock
from .cost import Pieces, StepCost, whole_layers
from .native_walk import NativeWalk

_NO_PAGES = np.empty((0, 0), PAGE_REF)


class TokenCharges:
    """Charges segments and attention of a step of one token when its last layer has attended.

    Args:
        used: called with how many pages the step attended to.
    """

    def __init__(self, cost: StepCost, clock: Clock, used: Callable[[int], None]) -> None:
        self._cost = cost
        self._clock = clock
        self._used = used
        self._segment_s = cost.segment(1)
        self._own_s = cost.attention(0.0, 0.0, 1.0)
        self._windows = np.array(cost.model.windows) if any(cost.model.windows) else None
        self._refs = _NO_PAGES
        self._position = 0
        self._layers: list[NativeWalk | None] = []
        # What is known of the pieces of these pages:
        self._known: tuple[object, ...] = ()
        self._slots: list[int] = []
        self._hot: list[int] = []
        self._seconds: list[float] = []
        self._last: list[int] = []  # the last piece of each layer
        self._open_slots = self._pages = 0

    def begin(self, refs: Refs, position: int) -> None:
        """Begin a step of the token at ``position`` that attends to ``refs`` [n_layers, n_pages]."""
        self._refs, self._position, self._layers = refs, position, []

    def attended(self, walk: NativeWalk | None) -> int:
        """Count a layer in which the token has attended, to pages of which some came on a ``walk``.

        Returns:
            -1, or the row of the layer's plan that a fault damaged.

        Raises:
            OSError: a read failed.
        """
        self._layers.append(walk)
        return self._charge(self._position) if len(self._layers) == self._cost.pages.n_layers else -1

    def _charge(self, position: int) -> int:
        """Charge all layers. A fault that begins meanwhile is met in the last one, or in the next step."""
        refs, self._refs = self._refs, _NO_PAGES
        streamed = next((walk for walk in self._layers if walk is not None), None)
        pieces = streamed.whole() if streamed is not None else whole_layers(*refs.shape)
        seconds = self._attention_seconds(refs, pieces, position)
        self._used(self._pages)
        if streamed is None:
            self._clock.work(*[part for one in seconds for part in (self._segment_s, one + self._own_s)])
            return -1
        at, damaged, work = 0, -1, self._clock.work
        for layer, walk in enumerate(self._layers):
            stop = at + streamed.count(layer)
            work(self._segment_s)
            if walk is None:
                work(sum(seconds[at:stop]) + self._own_s)
            else:
                damaged = walk.pass_through(layer, seconds[at:stop], heed=layer == len(refs) - 1)
                work(self._own_s)
            at = stop
        return damaged

    def _attention_seconds(self, refs: Refs, pieces: Pieces, position: int) -> list[float]:
        """Return the seconds to attend to each piece; mostly only the open page changes, the last of a layer."""
        cost, windows = self._cost, self._windows
        if windows is not None or not refs.size:
            first = np.where(windows, position - windows + 1, 0) if windows is not None else None
            slots, hot, self._pages = cost.pieces_slots(refs, pieces, first)
            return list(map(cost.token_attention, slots, hot))
        n_slots = refs["n_slots"]
        open_slots, known = int(n_slots[0, -1]), (pieces, refs["kind"].tobytes(), n_slots[:, :-1].tobytes())
        if known != self._known:
            self._known, self._open_slots = known, open_slots
            self._slots, self._hot, self._pages = cost.pieces_slots(refs, pieces)
            self._seconds = list(map(cost.token_attention, self._slots, self._hot))
            ends = np.searchsorted(pieces.starts, np.arange(1, len(refs) + 1) * refs.shape[1]) - 1
            self._last = ends.tolist()
        more = open_slots - self._open_slots
        for at in self._last:
            self._seconds[at] = cost.token_attention(self._slots[at] + more, self._hot[at] + more)
        return self._seconds
