"""Lets the time pass that a device would take for what a run tells of itself."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from edgekv.bundle import Manifest
from edgekv.runtime.kernels.interface import PAGE_REF, Int64, Refs

from ..clock import Clock
from ..drive import EmulatedMedium
from .cost import StepCost
from .native_walk import NativeWalk
from .token_step import TokenCharges


class Host(Protocol):
    """What the meter tells on: the device."""

    clock: Clock
    medium: EmulatedMedium

    def load(self, manifest: Manifest) -> None:
        """Read the weights of a bundle from the drive."""
        ...

    def begin_step(self, n_tokens: int) -> None:
        """The app begins a step."""
        ...

    def linked_until(self, asked_s: float) -> float:
        """Return when what was asked of the object store at ``asked_s`` is through."""
        ...

    def count_used(self, pages: int) -> None:
        """Attention read so many pages."""
        ...

    def count_fetched(self, pages: int) -> None:
        """So many pages came from flash."""
        ...


class DeviceMeter:
    """A :class:`~edgekv.runtime.meter.Meter` that charges the clock of a device; pages are paid for as the kernel comes to them.

    Attributes:
        whole_tokens: steps of one token are charged when their last layer has attended, while no read may fail.
    """

    whole_tokens = True

    def __init__(self, device: Host) -> None:
        self._device = device
        self._clock = device.clock
        self._medium = device.medium

    def price(self, cost: StepCost) -> None:
        """Charge by these prices from now on: a model was loaded."""
        self.cost = cost
        self._token = TokenCharges(cost, self._clock, self._device.count_used)
        self._walk = NativeWalk(0, self._medium, self._clock, cost, self._device.count_fetched)
        self._segment = functools.cache(cost.segment)
        self._head = functools.cache(cost.head)
        self._segment_s = 0.0
        self._n_tokens = self._from = 0
        self._refs: Refs = np.empty((0, 0), PAGE_REF)
        self._whole = False
        self._asked_s = 0.0
        self._done_s: list[float] = []  # by slot of the ring

    def loaded(self, manifest: Manifest) -> None:
        """Read the weights."""
        self._device.load(manifest)

    # -- a step ------------------------------------------------------------------------------------------------

    def step_began(self, n_tokens: int) -> None:
        """Begin a step."""
        self._device.begin_step(n_tokens)
        self._segment_s = self._segment(n_tokens)

    def segment_ran(self) -> None:
        """Charge a segment."""
        self._clock.compute(self._segment_s)

    def head_ran(self, rows: int) -> None:
        """Charge the last segment."""
        self._clock.compute(self._head(rows))

    def graph_ran(self, n_tokens: int, rows: int, hot: Sequence[int], warm: Sequence[int]) -> None:
        """Charge a step of the inline form; attention reads all pages that are among the inputs."""
        own = n_tokens * (n_tokens + 1) / 2
        seconds = len(hot) * self._segment(n_tokens) + (self._head(rows) if rows else 0.0)
        for fp16, int8 in zip(hot, warm, strict=True):
            seconds += self.cost.attention(fp16, int8, n_tokens * (fp16 + int8) + own)
        self._clock.compute(seconds)

    # -- attention, one layer after another --------------------------------------------------------------------

    def attention_began(self, positions: Int64, window: int) -> None:
        """Note who attends."""
        self._n_tokens = len(positions)
        self._from = int(positions[0]) - window + 1 if window else 0

    def attended(self, refs: Refs) -> None:
        """Charge the reading of pages."""
        seconds, count = self.cost.pages_seconds(refs, self._n_tokens, self._from)
        self._device.count_used(count)
        self._clock.compute(seconds)

    def attention_ended(self) -> None:
        """Charge the attention among the new tokens."""
        self._clock.compute(self.cost.attention(0.0, 0.0, self._n_tokens * (self._n_tokens + 1) / 2))

    # -- a step of one token through all layers at once --------------------------------------------------------

    def token_began(self, refs: Refs, position: int) -> None:
        """Charge the step as a whole; where reads may fail, each layer by itself, so that the page that did is named."""
        self._refs, self._n_tokens, self._position = refs, 1, position
        self._whole = self.whole_tokens and not self._medium.faulty
        if self._whole:
            self._token.begin(refs, position)

    def token_layer(self, layer: int, streamed: bool) -> int:
        """Charge a layer, or all of them when the last has attended."""
        walk = self._walk if streamed else None
        if self._whole:
            return self._token.attended(walk)
        self.segment_ran()
        window = self.cost.model.windows[layer]
        self._from = self._position - window + 1 if window else 0
        refs, own_s = self._refs[layer], self.cost.attention(0.0, 0.0, 1.0)
        if walk is None:
            seconds, count = self.cost.pages_seconds(refs, 1, self._from)
            self._device.count_used(count)
            self._clock.compute(seconds + own_s)
            return -1
        first = np.array([self._from]) if window else None
        slots, hot, count = self.cost.pieces_slots(refs[None], walk.of(layer), first)
        self._device.count_used(count)
        damaged = walk.pass_through(layer, list(map(self.cost.token_attention, slots, hot)), heed=True)
        self._clock.compute(own_s)
        return damaged

    # -- pages from flash --------------------------------------------------------------------------------------

    def ring_opened(self, n_slots: int) -> None:
        """Begin with an empty ring."""
        self._done_s = [0.0] * n_slots
        self._walk = NativeWalk(n_slots, self._medium, self._clock, self.cost, self._device.count_fetched)

    def asking(self) -> None:
        """Note when the drive is asked."""
        self._asked_s = self._medium.asked_until = self._clock.now

    def asked(self, slot: int) -> None:
        """Note when drive and object store will be done."""
        self._done_s[slot] = max(self._medium.asked_until, self._device.linked_until(self._asked_s))

    def took(self, slot: int, n_records: int) -> None:
        """Charge the taking, and wait for the drive."""
        self._clock.compute(self.cost.fetch(n_records))
        self._clock.wait_until(self._done_s[slot])
        self._device.count_fetched(n_records)

    def planned(self, layer: int, stops: Int64, counts: Int64, pages: Int64, places: Int64) -> None:
        """Note what a layer reads."""
        self._walk.plan(layer, stops, counts, pages, places)

    def forgot(self) -> None:
        """The drive has worked for nothing."""
        self._walk.forget()
