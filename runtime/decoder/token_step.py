"""The short way through a step of one token: no page changes its tier, so the bookkeeping of all layers is done at once.

It leaves the cache exactly as the general way does (:meth:`Attender.attend` and :meth:`KVCache.append`, layer by layer),
at a fraction of the Python: per layer, two kernel calls remain.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekv.tiers import Tier

from ..attention.attend import Attender
from ..engines.base import StepBuffers
from ..pages.cache import KVCache

Int = NDArray[np.int64]


class TokenStep:
    """Steps of one token over a cache whose pages are all in RAM, or on flash where the kernels can stream them.

    ``begin``, then ``layer`` for each layer, then ``commit``; ``cancel`` instead when something failed in between.
    """

    def __init__(self, cache: KVCache, attender: Attender) -> None:
        self._cache = cache
        self._attender = attender
        self._refs: NDArray[np.void] | None = None
        self._rows: list[NDArray[np.void]] = []
        self._mass: NDArray[np.float32] = np.empty((0, 0), np.float32)
        self._mass_rows: list[NDArray[np.float32]] = []
        self._addresses: list[int] = []
        self._page = self._inside = 0

    def begin(self) -> bool:
        """Open the page that the token goes to in every layer; False if the general way must be taken."""
        cache, table = self._cache, self._cache.table
        start = int(table.n_slots[0])
        self._page, self._inside = page, _ = divmod(start, cache.spec.page_size)
        table.grow(page + 1)
        n_pages = page + (self._inside > 0)
        if self._attender.selects(n_pages):
            return False
        if (table.n_slots != start).any():
            return False
        if n_pages and table.tier[:, :n_pages].max() >= Tier.COLD and not self._attender.streams(n_pages):
            return False
        if not self._inside:
            missing = np.flatnonzero(table.tier[:, page] == Tier.FREE)
            if len(missing) > cache.manager.arena.free_frames:
                return False
            for layer in missing.tolist():
                cache.manager.open_page(layer, page)
        elif (table.tier[:, page] != Tier.HOT).any():
            return False
        if self._refs is not table.refs or self._mass.shape[1] != n_pages:
            self._refs = table.refs
            self._rows = list(table.refs[:, :n_pages])
            self._mass = np.zeros((cache.spec.n_layers, n_pages), np.float32)
            self._mass_rows = list(self._mass)
        self._mass.fill(0)
        self._addresses = (table.offset[:, page] + cache.manager.arena.address).tolist()
        self._attender.begin_all(table.refs[:, :n_pages])
        return True

    def layer(self, layer: int, buffers: StepBuffers, positions: Int) -> None:
        """Attend the token to a layer and write its keys and values."""
        self._attender.attend_all(layer, buffers, positions, self._rows[layer], self._mass_rows[layer])
        self._cache.manager.kernels.write_hot(
            self._addresses[layer], self._inside, buffers.k, buffers.v, self._cache.spec.page_size
        )

    def commit(self, token: int) -> None:
        """Count the token in, and record which pages were used."""
        cache, table, inside = self._cache, self._cache.table, self._inside
        manager = cache.manager
        cache.touch_all(self._mass)
        table.tokens[:, self._page * cache.spec.page_size + inside] = token
        table.refs["mask"][:, self._page, inside // 64] |= np.uint64(1 << (inside % 64))
        table.refs["n_slots"][:, self._page] = inside + 1
        table.n_slots += 1
        for pruned in table.pruned:
            pruned.discard(token)
        if inside + 1 == cache.spec.page_size and manager.options.compress_at_seal:
            for layer in range(cache.spec.n_layers):
                manager.seal(layer, self._page)
        if manager.options.threshold < 1.0:
            manager.reclaim_to_threshold()

    def cancel(self) -> None:
        """Give back the pages that were opened for a token that never came."""
        if not self._inside:
            for layer in range(self._cache.spec.n_layers):
                if self._cache.table.live_slots(layer, self._page) == 0:
                    self._cache.manager.free_page(layer, self._page)
