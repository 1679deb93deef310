"""Inline programs of version 1 of the contract, which older bundles hold: one size for all layers, and some at the least."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgekv.bundle import Manifest
from edgekv.errors import EngineError

from .inline import Array, ExecutorchInline

#: The most cached tokens as pages and as recent tokens each, and the fewest pages and recent tokens: absent ones are masked.
_MOST_TOKENS = 4096
_LEAST = 2


class FirstExecutorchInline(ExecutorchInline):
    """Feeds programs of version 1."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int, cache: Path) -> None:
        super().__init__(folder, manifest, threads, cache)
        self._page_size = manifest.page_size
        self._n_layers = manifest.model.n_layers

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run a step on the inputs of version 1; the results are valid until the next one.

        Raises:
            EngineError: more cached tokens than the program was made for.
        """
        given = dict(feeds)
        pages, recent = (
            [len(given[f"{name}.{layer}"]) for layer in range(self._n_layers)] for name in ("key_pages", "recent_keys")
        )
        for at in range(self._n_layers):
            self._pad(given, at, max(_LEAST, *pages), max(_LEAST, *recent))
        results = self._run("decode" if len(given["input_ids"]) == 1 else "prefill", given)
        masses = {f"page_mass.{at}": results[f"page_mass.{at}"][:count] for at, count in enumerate(pages)}
        return {**results, **masses}

    def _pad(self, feeds: dict[str, Array], layer: int, to_pages: int, to_recent: int) -> None:
        """Add masked pages and recent tokens to a layer, up to so many."""
        names = [f"{name}.{layer}" for name in ("key_pages", "key_scales", "value_pages", "value_scales")]
        recent = [f"recent_keys.{layer}", f"recent_values.{layer}"]
        mask = f"slot_mask.{layer}"
        n_pages, n_recent = len(feeds[names[0]]), len(feeds[recent[0]])
        largest = max(n_pages * self._page_size, n_recent)
        if largest > _MOST_TOKENS:
            raise EngineError(
                f"executorch: the inline form holds {_MOST_TOKENS} tokens as pages and as recent tokens each,"
                f" not {largest}; export the bundle again"
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
