"""The pages of a layer as inputs of the inline graph: kept side by side from step to step, and patched where they changed.

The second copy of the cache that the inline form needs. A page that is sealed is written once, behind the ones before it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.codec import split_hot, unpack_warm_codes
from edgekv.contract import INLINE_CACHE, GraphSpec
from edgekv.spec import RECORD_HEADER_BYTES, PageSpec
from edgekv.tiers import Tier

from ..pages.cache import KVCache
from ..pages.table import UNSETTLED, offloaded

Array = NDArray[Any]
Int = NDArray[np.int64]
_PAGES, _RECENT = INLINE_CACHE[:5], INLINE_CACHE[5:]


class LayerInputs:
    """The inputs of one layer."""

    def __init__(self, cache: KVCache, layer: int, contract: GraphSpec) -> None:
        self._cache = cache
        self._layer = layer
        specs = {tensor.name: tensor for tensor in contract.inputs}
        size = cache.spec.page_size
        self._packed, self._hot = (
            _Rows({f"{name}.{layer}": _row(specs[f"{name}.{layer}"].dtype, cache.spec, name) for name in names})
            for names in (_PAGES, _RECENT)
        )
        self._size = size
        #: What the rows hold, in a form that is quickly compared: as long as it is the same, they only fill up.
        self._arrangement: tuple[int, bytes, bytes] | None = None
        self._packed_pages: Int = np.empty(0, np.int64)
        self._hot_pages, self._open_rows = self._packed_pages, self._packed_pages
        self._positions: tuple[Array, Array] = (self._packed_pages, self._packed_pages)
        self._feeds: dict[str, Array] = {}

    def bring_up_to_date(self, feeds: dict[str, Array]) -> tuple[Int, int]:
        """Fill ``feeds`` with the inputs; returns the pages that go in as INT8, and how many recent slots there are."""
        table, layer = self._cache.table, self._layer
        first, stop = int(table.first_seen()[layer]), table.n_pages(layer)
        tiers, contents = table.tier[layer, first:stop], table.content[layer, first:stop]
        arrangement = (first, tiers.tobytes(), contents.tobytes())
        if arrangement != self._arrangement:
            self._arrangement = None  # until all of it is there
            self._arrange(first, tiers, contents)
            # What comes from flash is read for this step alone.
            self._arrangement = None if offloaded(tiers).any() else arrangement
        else:
            self._write_hot(self._hot_pages, self._open_rows)
        held = table.tokens[layer].reshape(-1, self._size)
        np.take(held, self._packed_pages, axis=0, out=self._positions[0], mode="clip")
        np.take(held, self._hot_pages, axis=0, out=self._positions[1], mode="clip")
        feeds.update(self._feeds)
        return self._packed_pages, len(self._hot_pages) * self._size

    def _arrange(self, first: int, tiers: NDArray[np.uint8], contents: Int) -> None:
        """Let the rows be those of these pages, and write the ones that are not there."""
        away = offloaded(tiers)
        packed, hot = np.flatnonzero((tiers == Tier.WARM) | away), np.flatnonzero(tiers == Tier.HOT)
        self._packed_pages, self._hot_pages = first + packed, first + hot
        stale = self._packed.arrange(np.where(away[packed], UNSETTLED, contents[packed]))
        self._write_packed(self._packed_pages, stale, away[packed])
        self._packed.settle(stale)
        stale = self._hot.arrange(contents[hot])
        self._write_hot(self._hot_pages, stale)
        self._hot.settle(stale)
        self._open_rows = np.flatnonzero(contents[hot] == UNSETTLED)
        names = (f"page_positions.{self._layer}", f"recent_positions.{self._layer}")
        self._positions = (self._packed.view(names[0]), self._hot.view(names[1]))
        self._feeds = {name: self._packed.view(name) for name in self._packed.arrays}
        for name in self._hot.arrays:
            view = self._hot.view(name)
            self._feeds[name] = view.reshape(-1, *view.shape[2:])

    def _write_packed(self, pages: Int, stale: Int, away: NDArray[np.bool_]) -> None:
        spec, layer, manager = self._cache.spec, self._layer, self._cache.manager
        shape = (spec.n_kv_heads, spec.head_dim, spec.page_size)
        views = [self._packed.view(f"{name}.{layer}") for name in _PAGES[:4]]
        cold = stale[away[stale]]
        records = manager.read(layer, pages[cold].tolist()) if cold.size else ()
        for row, record in zip(cold.tolist(), records, strict=True):
            self._unpack(record[RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + spec.warm_bytes], views, row, shape)
        for row in stale[~away[stale]].tolist():
            offset = int(self._cache.table.offset[layer, pages[row]])
            self._unpack(manager.arena.page(offset, spec.warm_bytes), views, row, shape)

    @staticmethod
    def _unpack(payload: NDArray[np.uint8], views: list[Array], row: int, shape: tuple[int, int, int]) -> None:
        keys, *others = unpack_warm_codes(payload, *shape)
        for view, part in zip(views, (keys.swapaxes(1, 2), *others), strict=True):
            view[row] = part

    def _write_hot(self, pages: Int, stale: Int) -> None:
        spec, layer, manager = self._cache.spec, self._layer, self._cache.manager
        views = [self._hot.view(f"{name}.{layer}") for name in _RECENT[:2]]
        for row in stale.tolist():
            content = manager.arena.page(int(self._cache.table.offset[layer, pages[row]]), spec.hot_bytes)
            for view, part in zip(
                views, split_hot(content, spec.n_kv_heads, spec.head_dim, spec.page_size), strict=True
            ):
                view[row] = part.swapaxes(0, 1)


class _Rows:
    """Arrays that grow side by side by pages, and which content each row of them holds."""

    def __init__(self, rows: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        self.arrays: dict[str, Array] = {name: np.empty((0, *shape), dtype) for name, (dtype, shape) in rows.items()}
        self._contents: Int = np.empty(0, np.int64)
        self._wanted: Int = np.empty(0, np.int64)
        self._first = self._count = 0

    def view(self, name: str) -> Array:
        """Return the rows of the last arrangement."""
        return self.arrays[name][self._first : self._first + self._count]

    def arrange(self, contents: Int) -> Int:
        """Let there be a row for each of these contents, in order; returns the rows that must be written."""
        count = len(contents)
        self._skip(contents)
        if self._first + count > len(self._contents):
            self._move(count)
        there = self._contents[self._first : self._first + count]
        there[self._count :] = UNSETTLED
        stale: Int = np.flatnonzero((there != contents) | (contents == UNSETTLED))
        there[stale] = UNSETTLED  # until they are written
        self._count, self._wanted = count, contents
        return stale

    def settle(self, rows: Int) -> None:
        """Note that rows were written."""
        self._contents[self._first + rows] = self._wanted[rows]

    def _skip(self, contents: Int) -> None:
        """Leave out the first rows, where the new first one was not first: a window has moved on."""
        there = self._contents[self._first : self._first + self._count]
        if len(contents) and contents[0] != UNSETTLED and len(there) and there[0] != contents[0]:
            gone = np.flatnonzero(there == contents[0])
            if gone.size:
                self._first += int(gone[0])
                self._count -= int(gone[0])

    def _move(self, count: int) -> None:
        """Make room for ``count`` rows and a quarter more, at the beginning."""
        kept = slice(self._first, self._first + min(self._count, count))
        room = count + count // 4 + 8
        for name, array in self.arrays.items():
            wider = np.empty((room, *array.shape[1:]), array.dtype)
            wider[: kept.stop - kept.start] = array[kept]
            self.arrays[name] = wider
        contents = np.full(room, UNSETTLED, np.int64)
        contents[: kept.stop - kept.start] = self._contents[kept]
        self._contents, self._first, self._count = contents, 0, kept.stop - kept.start


def _row(dtype: str, spec: PageSpec, name: str) -> tuple[str, tuple[int, ...]]:
    """Return dtype and shape of one page of an input."""
    heads, dim, size = spec.n_kv_heads, spec.head_dim, spec.page_size
    shapes = {
        "key_pages": (heads, dim, size),
        "key_scales": (heads, dim),
        "value_pages": (heads, size, dim),
        "value_scales": (heads, size),
        "page_positions": (size,),
        "recent_keys": (size, heads, dim),
        "recent_values": (size, heads, dim),
        "recent_positions": (size,),
    }
    return dtype, shapes[name]
