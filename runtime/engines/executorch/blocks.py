"""How a step of any number of tokens is put together of methods whose shapes are fixed."""

from __future__ import annotations

import functools

import numpy as np

from edgekv.contract import EXECUTORCH_ROWS
from edgekv.spec import ModelSpec

from ..base import Float, StepBuffers

#: Time of a block of rows relative to that of one row, measured: what decides between padding and more blocks.
_COST = {1: 1.0, 16: 3.0, 128: 16.0}


@functools.lru_cache(maxsize=64)
def _cheapest(n_tokens: int) -> tuple[int, ...]:
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for rows in range(1, n_tokens + 1):
        options = []
        for size in EXECUTORCH_ROWS:
            cost, blocks = best[max(0, rows - size)]
            options.append((cost + _COST[size], (size, *blocks)))
        best.append(min(options))
    return tuple(sorted(best[n_tokens][1], reverse=True))


def plan_blocks(n_tokens: int) -> list[tuple[int, int]]:
    """Return (first row, rows) of the cheapest blocks that hold ``n_tokens`` rows; they may hold more."""
    largest = max(EXECUTORCH_ROWS)
    whole = max(0, n_tokens // largest - 1)
    sizes = [largest] * whole + list(_cheapest(n_tokens - whole * largest))
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def allocate(model: ModelSpec, rows: int) -> StepBuffers:
    """Return zeroed buffers of ``rows`` rows."""
    halves = [rope.rotary_dim // 2 for rope in model.ropes]

    def empty(*shape: int) -> Float:
        return np.zeros((rows, *shape), np.float32)

    return StepBuffers(
        residual=(empty(model.hidden_size), empty(model.hidden_size)),
        cos=tuple(empty(half) for half in halves),
        sin=tuple(empty(half) for half in halves),
        q=empty(model.n_q_heads, model.head_dim),
        k=empty(model.n_kv_heads, model.head_dim),
        v=empty(model.n_kv_heads, model.head_dim),
        attention=empty(model.n_q_heads, model.head_dim),
    )
