"""The next token of several sequences in one step: rows of one dense product, each of which attends to its own pages.

Where memory is what decoding waits for, the weights are read once for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from edgekv.spec import ModelSpec

from ..engines.base import Float, SegmentEngine, StepBuffers, rows_of
from .split import SplitForward

#: How often a step is timed; the first also loads what the engine loads at first use.
_TRIES = 4


def step_together(forwards: Sequence[SplitForward], tokens: Sequence[int], positions: Sequence[int]) -> Float:
    """Run one token of each sequence; the forwards are of one engine, and each ``goes_at_once``.

    Returns:
        logits [n, vocab_size], valid until the next step.

    Raises:
        CorruptPage, StoreError, KeysOverflow: no token was added to any sequence.
    """
    engine, n_layers = forwards[0].engine, forwards[0].cache.spec.n_layers
    at = np.asarray(positions, np.int64)
    buffers = engine.prepare(len(forwards))
    forwards[0].embedding.look_up(np.asarray(tokens, np.int64), buffers.residual[0])
    forwards[0].rope.fill(at, buffers.cos, buffers.sin)
    rows = [
        (forward.token_step, rows_of(buffers, index, 1), at[index : index + 1])
        for index, forward in enumerate(forwards)
    ]
    for forward in forwards:
        forward.cache.begin_step()
    try:
        for forward, position in zip(forwards, positions, strict=True):
            forward.token_step.begin(position)
        for layer in range(n_layers):
            engine.run(layer, buffers)
            for step, row, place in rows:
                step.attend(layer, row, place)
    except BaseException:
        for forward in forwards:
            forward.token_step.cancel()
        raise
    for forward, position in zip(forwards, positions, strict=True):
        forward.token_step.commit(position)
    return engine.head(buffers.residual[(n_layers - 1) % 2], buffers.attention)


def rows_agree(engine: SegmentEngine, model: ModelSpec, most: int) -> bool:
    """Say whether a row gets the same bits beside others as alone, tried on random rows for 2 to ``most`` of them.

    It is so where a product of few rows adds up in the order of a product of one. Where it is not, an answer would depend, in its
    last bits, on what else is answered at the moment.
    """
    random = np.random.default_rng(0)
    shapes = _arrays(engine.prepare(1))
    inputs = [random.standard_normal((most, *array.shape[1:])).astype(np.float32) for array in shapes]
    alone = [_outputs(engine, model, [array[row : row + 1] for array in inputs]) for row in range(most)]
    for count in range(2, most + 1):
        together = _outputs(engine, model, [array[:count] for array in inputs])
        for row in range(count):
            if any(not np.array_equal(out[row], own[0]) for out, own in zip(together, alone[row], strict=True)):
                return False
    return True


def rows_pay(engine: SegmentEngine, model: ModelSpec, most: int) -> bool:
    """Say whether 2 and ``most`` rows at once take less time than one after the other, tried on zeros.

    They do where weights are read from memory, and few methods are called; not where an engine has methods of 1 and of 16 rows
    alone, and no fast integer products: XNNPACK on AVX2 takes 13 times as long for 16 rows as for one.
    """
    one = _least_s(engine, model, 1)
    return all(_least_s(engine, model, count) < count * one for count in {2, most})


def _least_s(engine: SegmentEngine, model: ModelSpec, count: int) -> float:
    """Return seconds of a step of ``count`` rows without attention: the least of a few, which other programs disturb least."""
    found = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        buffers = engine.prepare(count)
        for layer in range(model.n_layers):
            engine.run(layer, buffers)
        engine.head(buffers.residual[(model.n_layers - 1) % 2], buffers.attention)
        found.append(time.perf_counter() - began)
    return min(found)


def _arrays(buffers: StepBuffers) -> list[Float]:
    """Return the buffers that segments read."""
    return [*buffers.residual, *buffers.cos, *buffers.sin, buffers.attention]


def _outputs(engine: SegmentEngine, model: ModelSpec, inputs: Sequence[Float]) -> list[Float]:
    """Return what every segment gives for the same inputs [n, ...]."""
    outputs = []
    for layer in range(model.n_layers):
        buffers = engine.prepare(len(inputs[0]))
        for array, values in zip(_arrays(buffers), inputs, strict=True):
            array[:] = values
        engine.run(layer, buffers)
        outputs += [buffers.q.copy(), buffers.k.copy(), buffers.v.copy(), buffers.residual[layer % 2].copy()]
    return [*outputs, engine.head(inputs[0], inputs[-1]).copy()]
