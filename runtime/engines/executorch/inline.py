"""ExecuTorch as the engine of the inline form: the whole decoder in one call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.bundle import Manifest
from edgekv.contract import EXECUTORCH_CACHED_TOKENS, EXECUTORCH_PREFILL_ROWS, GraphSpec
from edgekv.errors import EngineError

from .build import version
from .library import CallList, load_library
from .packed import PackedCache

Array = NDArray[Any]
#: The fewest pages and the fewest recent tokens that the program takes: absent ones are masked.
_LEAST = 2


class ExecutorchInline:
    """An :class:`~edgekv.runtime.engines.base.InlineEngine` on ExecuTorch."""

    max_tokens: int | None = EXECUTORCH_PREFILL_ROWS

    def __init__(self, folder: Path, manifest: Manifest, threads: int, cache: Path) -> None:
        self._library = load_library(cache)
        self._library.set_threads(threads)
        self.description = f"executorch {version()}"
        self._page_size = manifest.page_size
        self._n_layers = manifest.model.n_layers
        self._spec: GraphSpec = manifest.inline_spec()
        packed = PackedCache(cache, manifest, version())
        self._packed = packed
        path = folder / manifest.graphs[0]
        self._program = self._library.open(path, packed.open())
        for name in ("decode", "prefill"):
            if not self._program.has_method(name):
                raise EngineError(f"{path} has no method {name}; export the bundle again")
        self._outputs: dict[str, list[Array]] = {}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run a step; the results are valid until the next one.

        Raises:
            EngineError: more cached tokens than the program was made for.
        """
        rows = len(feeds["input_ids"])
        name = "decode" if rows == 1 else "prefill"
        method = self._program.method(name)
        if name not in self._outputs:
            self._outputs[name] = [np.zeros(shape, dtype) for dtype, shape in method.describe("out")]
        given = dict(feeds)
        # The program has one number of pages and one of recent tokens for all layers, and takes no fewer than some.
        pages, recent = (
            [len(given[f"{name}.{layer}"]) for layer in range(self._n_layers)] for name in ("key_pages", "recent_keys")
        )
        for at in range(self._n_layers):
            self._pad(given, at, max(_LEAST, *pages), max(_LEAST, *recent))
        outputs = self._outputs[name]
        inputs = [np.ascontiguousarray(given[tensor.name]) for tensor in self._spec.inputs]
        CallList(self._library, [method.bind(self._spec, inputs, outputs)]).run()
        results = {}
        for index, (tensor, output) in enumerate(zip(self._spec.outputs, outputs, strict=True)):
            shape = method.output_shape(index)
            value = output.reshape(-1)[: int(np.prod(shape))].reshape(shape)
            kind, _, layer = tensor.name.partition(".")
            results[tensor.name] = value[: pages[int(layer)]] if kind == "page_mass" else value
        return results

    def _pad(self, feeds: dict[str, Array], layer: int, to_pages: int, to_recent: int) -> None:
        """Add masked pages and recent tokens to a layer, up to so many."""
        names = [f"{name}.{layer}" for name in ("key_pages", "key_scales", "value_pages", "value_scales")]
        recent = [f"recent_keys.{layer}", f"recent_values.{layer}"]
        mask = f"slot_mask.{layer}"
        n_pages, n_recent = len(feeds[names[0]]), len(feeds[recent[0]])
        largest = max(n_pages * self._page_size, n_recent)
        if largest > EXECUTORCH_CACHED_TOKENS:
            raise EngineError(
                f"executorch: the inline form holds {EXECUTORCH_CACHED_TOKENS} tokens as pages and as recent tokens each,"
                f" not {largest}; export with --form split"
            )
        more_pages, more_recent = to_pages - n_pages, to_recent - n_recent
        if more_pages or more_recent:
            for group, more in ((names, more_pages), (recent, more_recent)):
                for name in group:
                    value = feeds[name]
                    feeds[name] = np.concatenate([value, np.zeros((more, *value.shape[1:]), value.dtype)])
            old, slots = feeds[mask], n_pages * self._page_size
            rows = len(old)
            parts = [
                old[:, :slots],
                np.zeros((rows, more_pages * self._page_size), bool),
                old[:, slots:],
                np.zeros((rows, more_recent), bool),
            ]
            feeds[mask] = np.concatenate(parts, axis=1)
