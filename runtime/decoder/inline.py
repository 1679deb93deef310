"""The inline form: one stock graph with the whole cache as explicit inputs and outputs.

The portable form: all pages that a step attends to are inputs of one call, so all of them are in RAM at once. Pages
on flash are read for the step and forgotten after it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekv.codec import split_hot, unpack_warm_codes
from edgekv.spec import RECORD_HEADER_BYTES, ModelSpec
from edgekv.tiers import Tier

from ..engines.base import Float, InlineEngine
from ..meter import SILENT, Meter
from ..pages.cache import KVCache
from ..pages.table import offloaded
from .base import Rows


class InlineForward:
    """A :class:`~edgekv.runtime.decoder.base.Forward` on the inline graph."""

    def __init__(self, engine: InlineEngine, model: ModelSpec, cache: KVCache, meter: Meter = SILENT) -> None:
        self._engine = engine
        self._model = model
        self._cache = cache
        self._meter = meter

    def step(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], rows: Rows) -> Float:
        """Run T tokens; see :class:`~edgekv.runtime.decoder.base.Forward`."""
        limit = self._engine.max_tokens
        if limit is not None and len(tokens) > limit:
            first = self.step(tokens[:limit], positions[:limit], "all" if rows == "all" else "none").copy()
            rest = self.step(tokens[limit:], positions[limit:], rows)
            return np.concatenate([first, rest])
        self._cache.begin_step()
        self._meter.step_began(len(tokens))
        feeds: dict[str, NDArray[np.generic]] = {"input_ids": tokens, "position_ids": positions}
        sealed = []
        for layer in range(self._model.n_layers):
            sealed.append(self._gather(layer, positions, feeds))
        results = self._engine.run(feeds)
        hot = [len(feeds[f"recent_keys.{layer}"]) for layer in range(self._model.n_layers)]
        warm = [len(pages) * self._cache.spec.page_size for pages in sealed]
        self._meter.graph_ran(len(tokens), hot, warm)
        for layer in range(self._model.n_layers):
            if len(tokens) == 1:
                mass = np.zeros(self._cache.table.n_pages(layer), np.float32)
                mass[sealed[layer]] = results[f"page_mass.{layer}"]
                self._cache.touch(layer, mass)
            self._cache.append(layer, results[f"new_keys.{layer}"], results[f"new_values.{layer}"], positions)
        logits: Float = results["logits"]
        return logits[{"none": slice(0, 0), "last": slice(-1, None), "all": slice(None)}[rows]]

    def _gather(
        self, layer: int, positions: NDArray[np.int64], feeds: dict[str, NDArray[np.generic]]
    ) -> NDArray[np.int64]:
        """Fill the inputs of one layer; returns the pages that went in as INT8."""
        cache, spec = self._cache, self._cache.spec
        table, size = cache.table, spec.page_size
        shape = (spec.n_kv_heads, spec.head_dim, size)
        first = int(table.first_seen()[layer])
        tiers = table.tier[layer, first : table.n_pages(layer)]
        packed = first + np.flatnonzero((tiers == Tier.WARM) | offloaded(tiers))
        hot = first + np.flatnonzero(tiers == Tier.HOT)
        codes = unpack_warm_codes(self._payloads(layer, packed, offloaded(tiers[packed - first])), *shape)
        for name, part in zip(("key_pages", "key_scales", "value_pages", "value_scales"), codes, strict=True):
            feeds[f"{name}.{layer}"] = np.ascontiguousarray(part)
        recent = split_hot(self._resident(layer, hot, spec.hot_bytes), *shape)
        for name, part in zip(("recent_keys", "recent_values"), recent, strict=True):
            feeds[f"{name}.{layer}"] = part.swapaxes(1, 2).reshape(-1, spec.n_kv_heads, spec.head_dim)
        slots = (np.concatenate([packed, hot])[:, None] * size + np.arange(size)).reshape(-1)
        held = table.tokens[layer, slots]
        mask = np.broadcast_to(held >= 0, (len(positions), len(slots)))
        window = self._model.windows[layer]
        if window:
            mask = mask & (positions[:, None] - held[None, :] < window)
        feeds[f"slot_mask.{layer}"] = np.ascontiguousarray(mask)
        return packed

    def _payloads(self, layer: int, pages: NDArray[np.int64], away: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """Return INT8 pages as [n, warm_bytes], from the arena or, where ``away``, from flash or the object store."""
        spec = self._cache.spec
        if not away.any():
            return self._resident(layer, pages, spec.warm_bytes)
        records = self._cache.manager.read(layer, pages[away].tolist())
        payloads = np.empty((len(pages), spec.warm_bytes), np.uint8)
        payloads[away] = records[:, RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + spec.warm_bytes]
        payloads[~away] = self._resident(layer, pages[~away], spec.warm_bytes)
        return payloads

    def _resident(self, layer: int, pages: NDArray[np.int64], size_bytes: int) -> NDArray[np.uint8]:
        """Copy pages out of the arena: [n, size_bytes]."""
        arena, copies = self._cache.manager.arena, np.empty((len(pages), size_bytes), np.uint8)
        for row, offset in enumerate(self._cache.table.offset[layer, pages].tolist()):
            copies[row] = arena.page(offset, size_bytes)
        return copies
