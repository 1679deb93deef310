"""ExecuTorch as the engine of the split form: one program, a method per segment and number of rows.

Shapes in the program are fixed, so a step of T tokens is put together of blocks of rows, the last one padded. All
methods share the weights: on disk, and in RAM in the order in which the CPU reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekv.bundle import Manifest
from edgekv.contract import EXECUTORCH_HEAD_ROWS, EXECUTORCH_ROWS, executorch_method, segment_spec
from edgekv.errors import EngineError

from ..base import Float, StepBuffers, outdated, rows_of
from .blocks import allocate, plan_blocks
from .build import version
from .library import Call, CallList, load_library
from .packed import PackedCache


@dataclass
class _Prepared:
    """Buffers for a number of tokens, and the calls of each segment on them."""

    buffers: StepBuffers
    padded: StepBuffers
    blocks: list[tuple[int, int]]
    calls: dict[int, CallList]


class ExecutorchSegments:
    """A :class:`~edgekv.runtime.engines.base.SegmentEngine` on ExecuTorch."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int, cache: Path) -> None:
        """Open a bundle.

        Args:
            cache: folder for what is made once per machine: the compiled shim, the packed weights.

        Raises:
            EngineMissing: executorch is not installed. EngineError: it refused the program.
        """
        self._library = load_library(cache)
        self._library.set_threads(threads)
        self.executor = self._library.executor
        self._model = manifest.model
        self.description = f"executorch {version()}"
        self._packed = PackedCache(cache, manifest, version())
        packed = None
        if manifest.operators == "edgekv":
            names, self.executor = self._library.set_operators(threads)
            self.description += f", operators by edgekv ({names})"
        else:
            packed = self._packed.open()
        self._program = self._library.open(folder / manifest.graphs[0], packed)
        self._prepared: dict[int, _Prepared] = {}
        self._current: _Prepared | None = None
        self._heads: dict[int, tuple[Float, Float, Float, CallList]] = {}
        n_layers = self._model.n_layers
        for index in range(n_layers + 1):
            rows = EXECUTORCH_HEAD_ROWS if index == n_layers else EXECUTORCH_ROWS
            for name in (executorch_method(f"segment_{index}", size) for size in rows):
                if not self._program.has_method(name):
                    raise EngineError(f"{folder / manifest.graphs[0]} has no method {name}; export the bundle again")

    def prepare(self, n_tokens: int) -> StepBuffers:
        """Return buffers for steps of ``n_tokens``; those of few tokens and of the last larger size are kept."""
        if n_tokens not in self._prepared:
            for size in outdated(self._prepared, n_tokens):
                del self._prepared[size]
            self._prepared[n_tokens] = self._allocate(n_tokens)
        self._current = self._prepared[n_tokens]
        return self._current.buffers

    def run(self, index: int, buffers: StepBuffers) -> None:
        """Run segment ``index`` on the buffers that were prepared last."""
        prepared = self._current
        assert prepared is not None
        if index not in prepared.calls:
            prepared.calls[index] = self._bind(index, prepared)
        prepared.calls[index].run()

    def head(self, residual: Float, attention: Float) -> Float:
        """Run the last segment on R rows."""
        rows = residual.shape[0]
        if rows not in self._heads:
            for size in outdated(self._heads, rows):
                del self._heads[size]
            self._heads[rows] = self._bind_head(rows)
        own_residual, own_attention, logits, calls = self._heads[rows]
        own_residual[:rows] = residual
        own_attention[:rows] = attention
        calls.run()
        return logits[:rows]

    def _allocate(self, n_tokens: int) -> _Prepared:
        blocks = plan_blocks(n_tokens)
        padded = allocate(self._model, sum(size for _, size in blocks))
        return _Prepared(rows_of(padded, 0, n_tokens), padded, blocks, {})

    def _bind(self, index: int, prepared: _Prepared) -> CallList:
        spec, calls = segment_spec(self._model, index), []
        for start, size in prepared.blocks:
            block = rows_of(prepared.padded, start, size)
            rope = self._model.rope_of(index)
            inputs = [block.residual[max(index - 1, 0) % 2], block.cos[rope], block.sin[rope]]
            outputs = [block.q, block.k, block.v]
            if index:
                inputs.insert(1, block.attention)
                outputs.insert(0, block.residual[index % 2])
            method = self._program.method(executorch_method(f"segment_{index}", size))
            calls.append(method.bind(spec, inputs, outputs))
        return CallList(self._library, calls)

    def _bind_head(self, rows: int) -> tuple[Float, Float, Float, CallList]:
        model = self._model
        size = max(EXECUTORCH_HEAD_ROWS) if rows > 1 else 1
        padded = -(-rows // size) * size
        residual = np.zeros((padded, model.hidden_size), np.float32)
        attention = np.zeros((padded, model.n_q_heads, model.head_dim), np.float32)
        logits = np.zeros((padded, model.vocab_size), np.float32)
        method = self._program.method(executorch_method(f"segment_{model.n_layers}", size))
        spec = segment_spec(model, model.n_layers)
        calls: list[Call] = []
        for start in range(0, padded, size):
            part = slice(start, start + size)
            calls.append(method.bind(spec, [residual[part], attention[part]], [logits[part]]))
        return residual, attention, logits, CallList(self._library, calls)
