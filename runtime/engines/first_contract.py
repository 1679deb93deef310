"""Inline graphs of version 1 of the contract, which older bundles hold, behind the inputs and outputs of version 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.spec import ModelSpec

from .base import InlineEngine

Array = NDArray[Any]


class FirstContract:
    """An :class:`~edgekv.runtime.engines.base.InlineEngine` around one whose graph keeps version 1.

    There, keys lie token by token, a mask per token says which slots it sees, and the logits are those of all tokens.
    """

    def __init__(self, engine: InlineEngine, model: ModelSpec) -> None:
        self._engine = engine
        self._windows = model.windows
        self.description = engine.description
        self.max_tokens = engine.max_tokens

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run a step; see :class:`~edgekv.runtime.engines.base.InlineEngine`."""
        given = dict(feeds)
        rows, positions = given.pop("logits_rows"), given["position_ids"]
        for layer, window in enumerate(self._windows):
            pages = f"key_pages.{layer}"
            given[pages] = np.ascontiguousarray(given[pages].swapaxes(2, 3))
            slots = [given.pop(f"{name}_positions.{layer}").reshape(-1) for name in ("page", "recent")]
            held = np.concatenate(slots)
            seen = np.broadcast_to(held >= 0, (len(positions), len(held)))
            if window:
                seen = seen & (positions[:, None] - held[None, :] < window)
            given[f"slot_mask.{layer}"] = np.ascontiguousarray(seen)
        results = self._engine.run(given)
        return {**results, "logits": results["logits"][rows]}
