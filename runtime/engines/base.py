"""What an engine must offer to run the split form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


@dataclass(frozen=True)
class StepBuffers:
    """The tensors between the segments for a step of T tokens, written in place by engine and seam in turn.

    ``residual``: two buffers [T, hidden_size]; segment ``l`` reads ``residual[(l - 1) % 2]`` and writes
    ``residual[l % 2]``. ``cos``, ``sin``: [T, rotary_dim / 2] of each rope of the model. ``q``, ``attention``:
    [T, n_q_heads, head_dim]. ``k``, ``v``: [T, n_kv_heads, head_dim].
    """

    residual: tuple[Float, Float]
    cos: tuple[Float, ...]
    sin: tuple[Float, ...]
    q: Float
    k: Float
    v: Float
    attention: Float


def rows_of(buffers: StepBuffers, start: int, count: int) -> StepBuffers:
    """Return views of ``count`` rows of every buffer."""

    def part(array: Float) -> Float:
        return array[start : start + count]

    return StepBuffers(
        residual=(part(buffers.residual[0]), part(buffers.residual[1])),
        cos=tuple(part(array) for array in buffers.cos),
        sin=tuple(part(array) for array in buffers.sin),
        q=part(buffers.q),
        k=part(buffers.k),
        v=part(buffers.v),
        attention=part(buffers.attention),
    )


#: Steps of so few tokens are those of answers: their buffers are small, and kept. Of longer ones the last size is.
FEW_TOKENS = 8


def outdated(sizes: Iterable[int], wanted: int) -> list[int]:
    """Return for which sizes of steps buffers are given up when those of another are made."""
    return [size for size in sizes if size > FEW_TOKENS and wanted > FEW_TOKENS]


class SegmentEngine(Protocol):
    """Runs the segments of a split bundle on buffers that it was asked to prepare."""

    #: For messages, such as "onnxruntime 1.32.0".
    description: str
    #: Address of a function that lends the engine's threads to the kernels (``Executor`` in native/thread_pool.h), or 0.
    executor: int

    def prepare(self, n_tokens: int) -> StepBuffers:
        """Return the buffers for steps of ``n_tokens``; the same ones for the same number until another is asked for."""
        ...

    def run(self, index: int, buffers: StepBuffers) -> None:
        """Run segment ``index`` (not the last) on the buffers."""
        ...

    def head(self, residual: Float, attention: Float) -> Float:
        """Run the last segment on R rows and return logits [R, vocab_size]; valid until the next call."""
        ...


class InlineEngine(Protocol):
    """Runs the graph of an inline bundle: names and shapes are those of :func:`edgekv.contract.inline_spec`, version 2."""

    description: str
    #: The most new tokens of one call; None has no limit.
    max_tokens: int | None

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run a step and return its outputs by name; valid until the next call."""
        ...
