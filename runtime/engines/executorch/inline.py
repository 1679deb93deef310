"""ExecuTorch as the engine of the inline form: the whole decoder in one call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.bundle import Manifest
from edgekv.contract import EXECUTORCH_PREFILL_ROWS, GraphSpec
from edgekv.errors import EngineError

from .build import version
from .library import CallList, load_library
from .packed import PackedCache

Array = NDArray[Any]


class ExecutorchInline:
    """An :class:`~edgekv.runtime.engines.base.InlineEngine` on ExecuTorch."""

    max_tokens: int | None = EXECUTORCH_PREFILL_ROWS

    def __init__(self, folder: Path, manifest: Manifest, threads: int, cache: Path) -> None:
        """Open a bundle; see :class:`~edgekv.runtime.engines.executorch.segments.ExecutorchSegments`."""
        self._library = load_library(cache)
        self._library.set_threads(threads)
        self.description = f"executorch {version()}"
        self._spec: GraphSpec = manifest.inline_spec()
        self._packed = PackedCache(cache, manifest, version())
        path = folder / manifest.graphs[0]
        self._program = self._library.open(path, self._packed.open())
        for name in ("decode", "prefill"):
            if not self._program.has_method(name):
                raise EngineError(f"{path} has no method {name}; export the bundle again")
        self._outputs: dict[str, list[Array]] = {}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run a step; the results are valid until the next one.

        Raises:
            EngineError: an input is not as the contract says, or longer than the model's context.
        """
        if len(feeds["input_ids"]) > 1:
            return self._run("prefill", feeds)
        # The methods differ in the last bits: one token is always `decode`, which gives logits, wanted or not. So a token that
        # is computed again has the keys that it had.
        results = self._run("decode", {**feeds, "logits_rows": np.zeros(1, np.int64)})
        return {**results, "logits": results["logits"][feeds["logits_rows"]]}

    def _run(self, name: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        method = self._program.method(name)
        if name not in self._outputs:
            self._outputs[name] = [np.zeros(shape, dtype) for dtype, shape in method.describe("out")]
        outputs = self._outputs[name]
        inputs = [np.ascontiguousarray(feeds[tensor.name]) for tensor in self._spec.inputs]
        CallList(self._library, [method.bind(self._spec, inputs, outputs)]).run()
        results = {}
        for index, (tensor, output) in enumerate(zip(self._spec.outputs, outputs, strict=True)):
            shape = method.output_shape(index)
            results[tensor.name] = output.reshape(-1)[: int(np.prod(shape))].reshape(shape)
        return results
