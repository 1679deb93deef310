"""The inline form: one stock graph with the whole cache as explicit inputs and outputs.

The portable form: all pages that a step attends to are inputs of one call, so all of them are in RAM at once. Pages
on flash are read for the step and forgotten after it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.contract import inline_spec
from edgekv.spec import ModelSpec

from ..engines.base import Float, InlineEngine
from ..meter import SILENT, Meter
from ..pages.cache import KVCache
from .base import Rows
from .page_inputs import LayerInputs

_ROWS = {"none": slice(0, 0), "last": slice(-1, None), "all": slice(None)}


class InlineForward:
    """A :class:`~edgekv.runtime.decoder.base.Forward` on the inline graph."""

    def __init__(self, engine: InlineEngine, model: ModelSpec, cache: KVCache, io: str, meter: Meter = SILENT) -> None:
        self.engine = engine
        self._model = model
        self._cache = cache
        self._meter = meter
        contract = inline_spec(model, cache.spec.page_size, io=io)
        self._inputs = [LayerInputs(cache, layer, contract) for layer in range(model.n_layers)]

    def step(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], rows: Rows) -> Float:
        """Run T tokens; see :class:`~edgekv.runtime.decoder.base.Forward`."""
        logits = []
        limit = self.engine.max_tokens or len(tokens)
        while len(tokens) > limit:
            part = self._step(tokens[:limit], positions[:limit], "all" if rows == "all" else "none")
            logits.append(part.copy())  # the next part takes its place
            tokens, positions = tokens[limit:], positions[limit:]
        last = self._step(tokens, positions, rows)
        return np.concatenate([*logits, last]) if rows == "all" and logits else last

    def _step(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], rows: Rows) -> Float:
        self._cache.begin_step()
        self._meter.step_began(len(tokens))
        wanted = np.arange(len(tokens))[_ROWS[rows]]
        feeds: dict[str, NDArray[Any]] = {"input_ids": tokens, "position_ids": positions, "logits_rows": wanted}
        sealed, hot = zip(*(layer.bring_up_to_date(feeds) for layer in self._inputs), strict=True)
        results = self.engine.run(feeds)
        warm = [len(pages) * self._cache.spec.page_size for pages in sealed]
        self._meter.graph_ran(len(tokens), len(wanted), hot, warm)
        for layer in range(self._model.n_layers):
            if len(tokens) == 1:
                mass = np.zeros(self._cache.table.n_pages(layer), np.float32)
                mass[sealed[layer]] = results[f"page_mass.{layer}"]
                self._cache.touch(layer, mass)
            self._cache.append(layer, results[f"new_keys.{layer}"], results[f"new_values.{layer}"], positions)
        logits: Float = results["logits"]
        return logits
