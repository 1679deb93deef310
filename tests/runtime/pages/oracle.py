"""A cache that is small, slow and obvious: what the page manager is judged against."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


class DictCache:
    """Keys and values per layer and token, in a dictionary; remembers the order of arrival."""

    def __init__(self, n_layers: int) -> None:
        self.held: list[dict[int, tuple[Float, Float]]] = [{} for _ in range(n_layers)]
        #: Tokens in the slots of each layer; None where the token was pruned.
        self.slots: list[list[int | None]] = [[] for _ in range(n_layers)]
        self.dropped: list[set[int]] = [set() for _ in range(n_layers)]

    def add(self, layer: int, tokens: Iterable[int], keys: Float, values: Float) -> None:
        """Add tokens with keys and values [n, heads, dim]."""
        for token, key, value in zip(tokens, keys, values, strict=True):
            self.held[layer][token] = (key.astype(np.float16), value.astype(np.float16))
            self.slots[layer].append(token)

    def prune(self, tokens: Iterable[int]) -> int:
        """Remove tokens everywhere; returns how many."""
        removed = 0
        for layer, slots in enumerate(self.slots):
            for token in tokens:
                if token in self.held[layer]:
                    del self.held[layer][token]
                    self.dropped[layer].discard(token)
                    slots[slots.index(token)] = None
                    removed += 1
        return removed

    def truncate(self, n_slots: int) -> None:
        """Keep the first slots of each layer."""
        for layer, slots in enumerate(self.slots):
            for token in slots[n_slots:]:
                if token is not None:
                    del self.held[layer][token]
                    self.dropped[layer].discard(token)
            del slots[n_slots:]
