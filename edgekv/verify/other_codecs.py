"""Other ways to quantise keys, emulated on the same graph and kernels, to see what they would cost.

Pages stay fp16. As soon as one is full, its keys and values are replaced by what a codec would give back, rounded to fp16 (an
eighth of the error of INT8, the same for every codec).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgekv.codec import quantise_keys, quantise_values
from edgekv.runtime.generate import Generator
from edgekv.tiers import Tier

Float = NDArray[np.float32]


@dataclass
class EmulatedCodec:
    """Keys with one scale per channel and page (as edgekv does) or per token; values with one per token.

    A :class:`~edgekv.verify.controls.Control` for runs with fp16 pages.
    """

    key_scales: Literal["channel", "token"]
    name: str = "an emulated codec"
    systematic: bool = True
    _done: set[tuple[int, int]] = field(default_factory=set)

    def install(self, generator: Generator) -> None:
        """Forget the pages of another lane."""
        self._done = set()

    def before_step(self, generator: Generator, position: int) -> None:
        """Replace the pages that have been filled since the last step."""
        cache = generator.cache
        if cache is None:
            return
        spec, table = cache.spec, cache.table
        n = spec.elements
        for layer, page in zip(*np.nonzero(table.sealed() & (table.tier == Tier.HOT)), strict=True):
            if (int(layer), int(page)) in self._done:
                continue
            self._done.add((int(layer), int(page)))
            halves = cache.manager.arena.page(int(table.offset[layer, page]), spec.hot_bytes).view(np.float16)
            keys = halves[:n].reshape(spec.n_kv_heads, spec.head_dim, spec.page_size).transpose(2, 0, 1)
            values = halves[n:].reshape(spec.n_kv_heads, spec.page_size, spec.head_dim).transpose(1, 0, 2)
            keys[:] = through_keys(keys.astype(np.float32), self.key_scales)
            values[:] = through_values(values.astype(np.float32))


def through_keys(keys: Float, per: Literal["channel", "token"]) -> Float:
    """Quantise keys [page_size, n_kv_heads, head_dim] and decode them."""
    if per == "token":
        return through_values(keys)
    codes, scales = quantise_keys(keys)
    return codes.astype(np.float32) * scales.astype(np.float32)[None]


def through_values(values: Float) -> Float:
    """Quantise values [page_size, n_kv_heads, head_dim], one scale per token and head, and decode them."""
    codes, scales = quantise_values(values)
    return codes.astype(np.float32) * scales.astype(np.float32)[:, :, None]
