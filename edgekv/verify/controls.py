"""Faults put in on purpose. A gate that passes a run with one of them is broken.

Each is put in where it would happen: in the bytes of a page, in the page table, in the codec, in the positions. Faults of
memory hit the configuration alone; faults of the code (``systematic``) hit the resident run of the same tier as well, so that
only the comparison with the full fp16 cache can see them.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgekv.runtime.decoder.base import Forward, Rows
from edgekv.runtime.engines.base import Float
from edgekv.runtime.generate import Generator
from edgekv.runtime.pages.table import NOTHING
from edgekv.spec import PageSpec
from edgekv.tiers import Tier


class Control(Protocol):
    """A fault. ``systematic``: one of the code, which every lane but the reference has."""

    name: str
    systematic: bool

    def install(self, generator: Generator) -> None:
        """Called before the cache of a lane is made."""
        ...

    def before_step(self, generator: Generator, position: int) -> None:
        """Called before each step, with the position of its first token."""
        ...


@dataclass
class FlippedBit:
    """One bit of one sealed page differs, and no checksum looks: the lowest bit of a value's code by default. Once per lane."""

    layer: int = 0
    page: int = 1
    bit: int = 0
    byte: int | None = None
    name: str = "one flipped bit"
    systematic: bool = False
    done: bool = False

    def install(self, generator: Generator) -> None:
        """Begin anew."""
        self.done = False

    def before_step(self, generator: Generator, position: int) -> None:
        """Flip the bit as soon as the page is sealed, while it is in RAM (before a checksum is taken)."""
        cache = generator.cache
        if self.done or cache is None or not cache.table.sealed()[self.layer, self.page]:
            return
        tier = cache.table.tier[self.layer, self.page]
        if tier not in (Tier.HOT, Tier.WARM):
            return
        spec = cache.spec
        size = spec.hot_bytes if tier == Tier.HOT else spec.warm_bytes
        first_value = 2 * spec.elements if tier == Tier.HOT else spec.elements
        payload = cache.manager.arena.page(int(cache.table.offset[self.layer, self.page]), size)
        payload[first_value if self.byte is None else self.byte] ^= 1 << self.bit
        self.done = True


@dataclass
class DroppedPage:
    """One page of one layer is gone, and nobody was told."""

    layer: int = 0
    page: int = 1
    name: str = "one page dropped"
    systematic: bool = False

    def install(self, generator: Generator) -> None:
        """Nothing to do."""

    def before_step(self, generator: Generator, position: int) -> None:
        """Take the page's tokens out of the page table."""
        cache = generator.cache
        if cache is not None and cache.table.sealed()[self.layer, self.page]:
            size = cache.spec.page_size
            cache.table.set_live(self.layer, self.page, 0, size, live=False)
            cache.table.tokens[self.layer, self.page * size : (self.page + 1) * size] = NOTHING


@dataclass
class ShuffledSummaries:
    """Each page is chosen by the summary of its neighbour. Only selective attention reads summaries."""

    name: str = "summaries shuffled"
    systematic: bool = False

    def install(self, generator: Generator) -> None:
        """Nothing to do."""

    def before_step(self, generator: Generator, position: int) -> None:
        """Move every summary on by one page."""
        summaries = generator.cache.manager.summaries if generator.cache is not None else None
        if summaries is not None:
            codes = summaries._codes
            codes[:, :, 1:] = np.roll(codes[:, :, 1:], 1, axis=2)


@dataclass
class SwappedScales:
    """The codec writes the values' scales where the keys' belong, and the other way round."""

    name: str = "scales of keys and values swapped"
    systematic: bool = True

    def install(self, generator: Generator) -> None:
        """Put a codec with the mistake between the cache and the kernels."""
        generator.kernels = _SwappingKernels(generator.kernels)  # type: ignore[assignment]

    def before_step(self, generator: Generator, position: int) -> None:
        """Nothing to do."""


class _SwappingKernels:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def pack_warm(self, hot: Any, out: Any, n_kv_heads: int, head_dim: int, page_size: int, n_slots: int = -1) -> None:
        self._inner.pack_warm(hot, out, n_kv_heads, head_dim, page_size, n_slots)
        swap_scales(out, PageSpec(1, n_kv_heads, head_dim, page_size))

    def pack_warm_many(
        self, pool: Any, sources: Any, targets: Any, n_slots: Any, n_kv_heads: int, head_dim: int, page_size: int
    ) -> None:
        self._inner.pack_warm_many(pool, sources, targets, n_slots, n_kv_heads, head_dim, page_size)
        for target in targets.tolist():
            swap_scales(target, PageSpec(1, n_kv_heads, head_dim, page_size))


def swap_scales(page: NDArray[np.uint8] | int, spec: PageSpec) -> None:
    """Exchange the two blocks of scales of a WARM page, given as an array or by address."""
    if isinstance(page, int):
        page = np.ctypeslib.as_array((ctypes.c_uint8 * spec.warm_bytes).from_address(page))
    scales = page[2 * spec.elements : spec.warm_bytes].view(np.float16)
    keys = spec.n_kv_heads * spec.head_dim
    scales[:] = np.concatenate([scales[keys:], scales[:keys]])


@dataclass
class ShiftedRope:
    """From a position on, tokens are rotated as if they stood ``by`` further: a session resumed off by one."""

    start: int
    by: int = 1
    name: str = "RoPE shifted by one"
    systematic: bool = True

    def install(self, generator: Generator) -> None:
        """Nothing to do: there is no forward yet."""

    def before_step(self, generator: Generator, position: int) -> None:
        """Put wrong positions between the loop and the decoder."""
        prepared = generator.prepared
        if position >= self.start and prepared is not None and not isinstance(prepared.forward, _ShiftedForward):
            prepared.forward = _ShiftedForward(prepared.forward, self.by)


class _ShiftedForward:
    def __init__(self, inner: Forward, by: int) -> None:
        self._inner = inner
        self._by = by

    def step(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], rows: Rows) -> Float:
        return self._inner.step(tokens, positions + self._by, rows)
