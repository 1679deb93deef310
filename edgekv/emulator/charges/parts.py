"""The engine and the attention of an app on an emulated device: the real ones, and the time that the device would take."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgekv.runtime.engines.base import InlineEngine, SegmentEngine, StepBuffers
from edgekv.runtime.kernels.interface import Float, Int64, PagedAttention, Refs, StreamingAttention

from ..clock import Clock
from .cost import StepCost
from .native_walk import EmulatedStream
from .token_step import TokenCharges


class EmulatedSegments:
    """A :class:`SegmentEngine` that takes the time of a device.

    Args:
        token: charges for steps of one token instead, when it is active.
        began: called at the start of a step, with its number of tokens.
    """

    def __init__(
        self,
        engine: SegmentEngine,
        cost: StepCost,
        clock: Clock,
        token: TokenCharges,
        began: Callable[[int], None],
    ) -> None:
        self._token = token
        self.description = engine.description
        self.executor = engine.executor
        self._engine = engine
        self._clock = clock
        self._began = began
        self._segment = functools.cache(cost.segment)
        self._head = functools.cache(cost.head)
        self._segment_s = 0.0

    def prepare(self, n_tokens: int) -> StepBuffers:
        """Begin a step."""
        self._began(n_tokens)
        self._segment_s = self._segment(n_tokens)
        return self._engine.prepare(n_tokens)

    def run(self, index: int, buffers: StepBuffers) -> None:
        """Run a segment."""
        self._engine.run(index, buffers)
        if not self._token.active:
            self._clock.compute(self._segment_s)

    def head(self, residual: Float, attention: Float) -> Float:
        """Run the last segment."""
        logits = self._engine.head(residual, attention)
        self._clock.compute(self._head(len(residual)))
        return logits


class EmulatedInline:
    """An :class:`InlineEngine` that takes the time of a device."""

    def __init__(self, engine: InlineEngine, cost: StepCost, clock: Clock, began: Callable[[int], None]) -> None:
        self.description = engine.description
        self.max_tokens = engine.max_tokens
        self._engine = engine
        self._cost = cost
        self._clock = clock
        self._began = began

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run a step; attention reads all pages that are among the inputs."""
        n_tokens = len(feeds["input_ids"])
        self._began(n_tokens)
        outputs = self._engine.run(feeds)
        model, size = self._cost.model, self._cost.pages.page_size
        seconds = model.n_layers * self._cost.segment(n_tokens) + self._cost.head(n_tokens)
        for layer in range(model.n_layers):
            warm = feeds[f"key_pages.{layer}"].shape[0] * size
            hot = feeds[f"recent_keys.{layer}"].shape[0]
            pairs = n_tokens * (warm + hot) + n_tokens * (n_tokens + 1) / 2
            seconds += self._cost.attention(hot, warm, pairs)
        self._clock.compute(seconds)
        return outputs


class EmulatedAttention:
    """A :class:`PagedAttention` that takes the time of a device; pages are paid for as the kernel comes to them.

    Arguments that cost nothing are handed through as they are.

    Args:
        token: charges for steps of one token instead, when it is active.
        used: called with how many pages the kernel attended to.
    """

    def __init__(
        self,
        attention: PagedAttention,
        cost: StepCost,
        clock: Clock,
        token: TokenCharges,
        used: Callable[[int], None],
    ) -> None:
        self._attention = attention
        self._token = token
        self._cost = cost
        self._clock = clock
        self._used = used
        self._n_tokens = 0
        self._from = 0

    def run(self, q: Float, new_k: Float, new_v: Float, positions: Int64, refs: Refs, *rest: Any, **named: Any) -> None:
        """Attend to pages that are all in memory."""
        self._attention.run(q, new_k, new_v, positions, refs, *rest, **named)
        if self._token.active:
            self._token.attended(positions)
            return
        self._begin(positions, rest[1] if len(rest) > 1 else named.get("window", 0))
        self._charge(refs, own=True)

    def begin(
        self, q: Float, new_k: Float, new_v: Float, positions: Int64, window: int, *rest: Any, **named: Any
    ) -> None:
        """Start a step whose pages come in pieces."""
        self._attention.begin(q, new_k, new_v, positions, window, *rest, **named)
        self._begin(positions, window)

    def pages(self, refs: Refs, start: int, stop: int) -> None:
        """Attend to a piece."""
        self._attention.pages(refs, start, stop)
        self._charge(refs[start:stop], own=False)

    def stream(
        self,
        rows: EmulatedStream,
        layer: int,
        q: Float,
        new_k: Float,
        new_v: Float,
        positions: Int64,
        refs: Refs,
        out: Float,
        window: int = 0,
        page_mass: Float | None = None,
    ) -> int:
        """Attend to the pages of a plan; the native call moves the bytes, the plan says what that takes."""
        native = cast(StreamingAttention, self._attention)
        bad = native.stream(rows.native, layer, q, new_k, new_v, positions, refs, out, window, page_mass)
        if self._token.active:
            return max(bad, self._token.attended(positions, rows))
        self._begin(positions, window)
        first = np.array([self._from]) if window else None
        slots, hot, count = self._cost.pieces_slots(refs[None], rows.of(layer), first)
        self._used(count)
        damaged = rows.walk(layer, list(map(self._cost.token_attention, slots, hot)), heed=True)
        self._charge(None, own=True)
        return max(bad, damaged)

    def finish(self, *rest: Any, **named: Any) -> None:
        """Attend to the new tokens themselves."""
        self._attention.finish(*rest, **named)
        self._charge(None, own=True)

    @property
    def isa(self) -> str:
        """Name of the instruction set in use."""
        return self._attention.isa

    @property
    def buffer_bytes(self) -> int:
        """Memory held for intermediate results."""
        return self._attention.buffer_bytes

    def _begin(self, positions: Int64, window: int) -> None:
        self._n_tokens = len(positions)
        self._from = int(positions[0]) - window + 1 if window else 0

    def _charge(self, refs: Refs | None, *, own: bool) -> None:
        seconds = 0.0
        if refs is not None:
            seconds, count = self._cost.pages_seconds(refs, self._n_tokens, self._from)
            self._used(count)
        if own:
            seconds += self._cost.attention(0.0, 0.0, self._n_tokens * (self._n_tokens + 1) / 2)
        self._clock.compute(seconds)
