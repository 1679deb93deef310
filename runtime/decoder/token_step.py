"""A step of one token through all layers at once: no page changes its tier on the way, so the bookkeeping is done in one go.

It leaves the cache exactly as going layer by layer does (:meth:`Attender.attend` and :meth:`KVCache.append`), at a fraction of
the Python: per layer, two kernel calls remain. :class:`~edgekv.runtime.decoder.split.SplitForward` chooses which way a step goes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..attention.attend import Attender
from ..engines.base import SegmentEngine, StepBuffers
from ..pages.cache import KVCache, TokenPlace, overflow

Int = NDArray[np.int64]


class TokenStep:
    """Steps of one token over a cache whose pages are all in RAM, or on flash where the kernels can stream them."""

    def __init__(self, engine: SegmentEngine, cache: KVCache, attender: Attender) -> None:
        self._engine = engine
        self._cache = cache
        self._attender = attender
        self._place: TokenPlace | None = None
        # Rows of the page table and of the mass by layer, kept from token to token while the pages are as many.
        self._refs: NDArray[np.void] | None = None
        self._rows: list[NDArray[np.void]] = []
        self._mass: NDArray[np.float32] = np.empty((0, 0), np.float32)
        self._mass_rows: list[NDArray[np.float32]] = []

    def run(self, buffers: StepBuffers, positions: Int) -> None:
        """Run the segments on the token in ``buffers`` at ``positions`` [1], and add it to the cache."""
        self.begin(int(positions[0]))
        try:
            for layer in range(self._cache.spec.n_layers):
                self._engine.run(layer, buffers)
                self.attend(layer, buffers, positions)
        except BaseException:
            self.cancel()
            raise
        self.commit(int(positions[0]))

    def begin(self, position: int) -> None:
        """Open the places of a token at ``position``; :meth:`commit` or :meth:`cancel` ends it."""
        cache = self._cache
        self._place = place = cache.begin_token()
        try:
            self._view(place.page + (place.inside > 0))
            self._attender.begin_all(cache.table.refs[:, : self._mass.shape[1]], position)
        except BaseException:
            self.cancel()
            raise

    def attend(self, layer: int, buffers: StepBuffers, positions: Int) -> None:
        """Attend the token in ``buffers`` [1] at ``positions`` [1] in one layer, and write its keys and values to their place."""
        cache, place = self._cache, self._place
        assert place is not None
        self._attender.attend_all(layer, buffers, positions, self._rows[layer], self._mass_rows[layer])
        write_hot = cache.manager.kernels.write_hot
        if not write_hot(place.addresses[layer], place.inside, buffers.k, buffers.v, cache.spec.page_size):
            raise overflow(layer, int(positions[0]))

    def commit(self, token: int) -> None:
        """Count the token in, which all layers hold."""
        place, self._place = self._place, None
        assert place is not None
        self._cache.commit_token(place, token, self._mass)

    def cancel(self) -> None:
        """Give back what was opened."""
        place, self._place = self._place, None
        if place is not None:
            self._cache.cancel_token(place)

    def _view(self, n_pages: int) -> None:
        table = self._cache.table
        if self._refs is not table.refs or self._mass.shape[1] != n_pages:
            self._refs = table.refs
            self._rows = list(table.refs[:, :n_pages])
            self._mass = np.zeros((self._cache.spec.n_layers, n_pages), np.float32)
            self._mass_rows = list(self._mass)
        self._mass.fill(0)
