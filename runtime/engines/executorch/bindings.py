"""ExecuTorch through its Python bindings: for machines without a C++ compiler. Needs torch, and copies every output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgekv.bundle import Manifest
from edgekv.contract import EXECUTORCH_HEAD_ROWS, executorch_method
from edgekv.errors import EngineError, EngineMissing

from ..base import Float, StepBuffers, outdated, rows_of
from .blocks import allocate, plan_blocks
from .build import version


class PybindSegments:
    """A :class:`~edgekv.runtime.engines.base.SegmentEngine` on ``executorch.runtime``."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int, reason: str) -> None:
        """Open a bundle.

        Args:
            reason: why this engine is used and not the faster one.

        Raises:
            EngineMissing: torch is not installed either. EngineError: executorch refused the program.
        """
        try:
            self._torch = __import__("torch")
            from executorch.runtime import Runtime
        except (ImportError, OSError) as error:
            raise EngineMissing(f"{reason}; or install torch, which the slower engine needs") from error
        self._torch.set_num_threads(threads)
        path = folder / manifest.graphs[0]
        try:
            self._program = Runtime.get().load_program(str(path))
        except RuntimeError as error:
            raise EngineError(f"executorch {version()} cannot load {path}: {error}; export the bundle again") from error
        self.description = f"executorch {version()} through torch, slower ({reason})"
        self.executor = 0
        self._model = manifest.model
        self._methods: dict[str, Any] = {}
        self._prepared: dict[int, tuple[StepBuffers, StepBuffers, list[tuple[int, int]]]] = {}
        self._current: tuple[StepBuffers, StepBuffers, list[tuple[int, int]]] | None = None

    def prepare(self, n_tokens: int) -> StepBuffers:
        """Return buffers for steps of ``n_tokens``; those of few tokens and of the last larger size are kept."""
        if n_tokens not in self._prepared:
            for size in outdated(self._prepared, n_tokens):
                del self._prepared[size]
            blocks = plan_blocks(n_tokens)
            padded = allocate(self._model, sum(size for _, size in blocks))
            self._prepared[n_tokens] = (rows_of(padded, 0, n_tokens), padded, blocks)
        self._current = self._prepared[n_tokens]
        return self._current[0]

    def run(self, index: int, buffers: StepBuffers) -> None:
        """Run segment ``index`` on the buffers that were prepared last."""
        assert self._current is not None
        _, padded, blocks = self._current
        for start, size in blocks:
            block = rows_of(padded, start, size)
            rope = self._model.rope_of(index)
            inputs = [block.residual[max(index - 1, 0) % 2], block.cos[rope], block.sin[rope]]
            outputs = [block.q, block.k, block.v]
            if index:
                inputs.insert(1, block.attention)
                outputs.insert(0, block.residual[index % 2])
            for array, result in zip(outputs, self._execute(f"segment_{index}", size, inputs), strict=True):
                array[:] = result

    def head(self, residual: Float, attention: Float) -> Float:
        """Run the last segment on R rows."""
        rows = residual.shape[0]
        size = max(EXECUTORCH_HEAD_ROWS) if rows > 1 else 1
        padded = -(-rows // size) * size
        inputs = [np.zeros((padded, *array.shape[1:]), np.float32) for array in (residual, attention)]
        inputs[0][:rows], inputs[1][:rows] = residual, attention
        logits = [
            self._execute(f"segment_{self._model.n_layers}", size, [array[start : start + size] for array in inputs])[0]
            for start in range(0, padded, size)
        ]
        result: Float = np.concatenate(logits)[:rows]
        return result

    def _execute(self, segment: str, size: int, inputs: list[Float]) -> list[Float]:
        name = executorch_method(segment, size)
        try:
            if name not in self._methods:
                self._methods[name] = self._program.load_method(name)
            given = [self._torch.from_numpy(array) for array in inputs]
            return [output.numpy() for output in self._methods[name].execute(given)]
        except (RuntimeError, AttributeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise EngineError(f"executorch {version()} cannot run {name}: {reason}; export the bundle again") from error
