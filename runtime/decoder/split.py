"""One step of the decoder in the split form: new tokens in, logits out, the cache extended."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..attention.attend import Attender
from ..engines.base import Float, SegmentEngine
from ..meter import SILENT, Meter
from ..pages.cache import KVCache
from .base import Rows
from .embedding import Embedding
from .rope import Rope
from .token_step import TokenStep


class SplitForward:
    """The split form: an engine runs the dense segments, the kernels run attention between them."""

    def __init__(
        self,
        engine: SegmentEngine,
        embedding: Embedding,
        rope: Rope,
        cache: KVCache,
        attender: Attender,
        meter: Meter = SILENT,
    ) -> None:
        self.engine = engine
        self.embedding = embedding
        self.rope = rope
        #: Where the pages of its sequence are.
        self.cache = cache
        #: A step of one token through all layers at once.
        self.token_step = TokenStep(engine, cache, attender)
        self._attender = attender
        self._meter = meter

    def step(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], rows: Rows) -> Float:
        """Run T tokens; see :class:`Forward`."""
        engine, cache = self.engine, self.cache
        n_layers = cache.spec.n_layers
        self._meter.step_began(len(tokens))
        buffers = engine.prepare(len(tokens))
        cache.begin_step()
        self.embedding.look_up(tokens, buffers.residual[0])
        self.rope.fill(positions, buffers.cos, buffers.sin)
        if self.goes_at_once(len(tokens), rows):
            self.token_step.run(buffers, positions)
            return self._head(buffers.residual[(n_layers - 1) % 2], buffers.attention)
        for layer in range(n_layers):
            engine.run(layer, buffers)
            self._meter.segment_ran()
            # What the last layer attends to only matters for the logits.
            if rows != "none" or layer < n_layers - 1:
                self._attender.attend(layer, buffers.q, buffers.k, buffers.v, positions, buffers.attention)
            cache.append(layer, buffers.k, buffers.v, positions)
        if rows == "none":
            return buffers.residual[0][:0]
        first = 0 if rows == "all" else len(tokens) - 1
        return self._head(buffers.residual[(n_layers - 1) % 2][first:], buffers.attention[first:])

    def _head(self, residual: Float, attention: Float) -> Float:
        logits = self.engine.head(residual, attention)
        self._meter.head_ran(len(residual))
        return logits

    def goes_at_once(self, n_tokens: int, rows: Rows) -> bool:
        """Choose the way of a step: through all layers at once, or layer by layer. Both leave the same bits."""
        cache, attender = self.cache, self._attender
        if n_tokens != 1:
            return False  # a chunk may fill pages, which need room that only reclaim can make
        if rows == "none":
            return False  # the last layer need not attend
        if not cache.can_begin_token():
            return False  # layers differ, or a page must leave first
        n_pages = cache.table.n_pages(0)
        if attender.selects(n_pages):
            return False  # chosen pages become resident in mid-step
        return attender.reaches_all(n_pages)
