"""The inline form: one stock graph with the whole cache as explicit inputs and outputs.

The portable form: all pages that a step attends to are inputs of one call, so all of them are in RAM at once. Pages
on flash are read for the step and forgotten after it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekv.codec import unpack_hot, unpack_warm_codes
from edgekv.runtime.cache import KVCache
from edgekv.runtime.engines.base import Float, InlineEngine
from edgekv.runtime.forward import Rows
from edgekv.runtime.table import offloaded
from edgekv.spec import RECORD_HEADER_BYTES, ModelSpec
from edgekv.types import Tier


class InlineForward:
    """A :class:`~edgekv.runtime.forward.Forward` on the inline graph."""

    def __init__(self, engine: InlineEngine, model: ModelSpec, cache: KVCache) -> None:
        self._engine = engine
        self._model = model
        self._cache = cache

    def step(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], rows: Rows) -> Float:
        """Run T tokens; see :class:`~edgekv.runtime.forward.Forward`."""
        limit = self._engine.max_tokens
        if limit is not None and len(tokens) > limit:
            first = self.step(tokens[:limit], positions[:limit], "all" if rows == "all" else "none").copy()
            rest = self.step(tokens[limit:], positions[limit:], rows)
            return np.concatenate([first, rest])
        self._cache.manager.step += 1
        feeds: dict[str, NDArray[np.generic]] = {"input_ids": tokens, "position_ids": positions}
        sealed = []
        for layer in range(self._model.n_layers):
            sealed.append(self._gather(layer, positions, feeds))
        results = self._engine.run(feeds)
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
        tiers = table.tier[layer, : table.n_pages(layer)]
        packed = np.flatnonzero((tiers == Tier.WARM) | offloaded(tiers))
        hot = np.flatnonzero(tiers == Tier.HOT)
        shape = (len(packed), spec.n_kv_heads, size, spec.head_dim)
        key_pages, value_pages = np.empty(shape, np.int8), np.empty(shape, np.int8)
        key_scales = np.empty((len(packed), spec.n_kv_heads, spec.head_dim), np.float16)
        value_scales = np.empty((len(packed), spec.n_kv_heads, size), np.float16)
        record = np.empty((1, spec.record_bytes), np.uint8)
        for row, page in enumerate(packed.tolist()):
            if tiers[page] != Tier.WARM:
                cache.manager.read_records(layer, [page], record)
                payload = record[0, RECORD_HEADER_BYTES:]
            else:
                payload = cache.manager.arena.page(int(table.offset[layer, page]), spec.warm_bytes)
            key_pages[row], key_scales[row], value_pages[row], value_scales[row] = unpack_warm_codes(
                payload, spec.n_kv_heads, spec.head_dim, size
            )
        recent = [
            unpack_hot(
                cache.manager.arena.page(int(table.offset[layer, page]), spec.hot_bytes),
                *shape[1:2],
                spec.head_dim,
                size,
            )
            for page in hot.tolist()
        ]
        empty = np.zeros((0, spec.n_kv_heads, spec.head_dim), np.float16)
        feeds[f"key_pages.{layer}"], feeds[f"key_scales.{layer}"] = key_pages, key_scales
        feeds[f"value_pages.{layer}"], feeds[f"value_scales.{layer}"] = value_pages, value_scales
        for name, part in (("recent_keys", 0), ("recent_values", 1)):
            rows = [page[part].transpose(1, 0, 2).astype(np.float16) for page in recent]
            feeds[f"{name}.{layer}"] = np.concatenate(rows) if rows else empty
        slots = (np.concatenate([packed, hot])[:, None] * size + np.arange(size)).reshape(-1)
        held = table.tokens[layer, slots]
        mask = np.broadcast_to(held >= 0, (len(positions), len(slots)))
        window = self._model.windows[layer]
        if window:
            mask = mask & (positions[:, None] - held[None, :] < window)
        feeds[f"slot_mask.{layer}"] = np.ascontiguousarray(mask)
        return packed
