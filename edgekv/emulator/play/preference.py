"""What attention would prefer, where there are no weights to say it.

Page masses are drawn from a log-normal distribution per page, with attention sinks and a recent window, which is what decoders
show (H2O, arXiv 2306.14048; StreamingLLM, arXiv 2309.17453).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekv.runtime.kernels.interface import Float

#: Spread of page masses (sigma of the logarithm), and what the first page and the newest ones have more than others.
MASS_SPREAD, SINK, RECENT, RECENT_PAGES = 1.5, 20.0, 10.0, 8.0
#: How much the pages that a step wants differ from those that hold the mass over time (sigma of the logarithm).
STEP_SPREAD = 0.5


class Preference:
    """Draws what a model with ``n_layers`` makes of up to ``n_pages`` pages; equal seeds and questions give equal answers.

    Attributes:
        layer: the one whose turn it is; whoever runs the layers says so.
    """

    def __init__(self, n_layers: int, n_pages: int, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._popularity = np.exp(self._random.normal(0, MASS_SPREAD, (n_layers, n_pages))).astype(np.float32)
        self._popularity[:, 0] *= SINK
        self.layer = 0

    def mass(self, attended: NDArray[np.bool_]) -> Float:
        """Return the softmax mass of each page [n_pages] of the layer: it sums to 1 over those that were attended to."""
        mass = np.where(attended, self._standing(attended.size), np.float32(0))
        shares: Float = mass / np.maximum(mass.sum(), np.float32(1e-30))
        return shares

    def scores(self, n_pages: int) -> Float:
        """Draw the score [n_pages] of each page of the layer for one more query."""
        noise = self._random.normal(0, STEP_SPREAD, n_pages).astype(np.float32)
        scores: Float = np.log(self._standing(n_pages)) + noise
        return scores

    def _standing(self, n_pages: int) -> Float:
        recent = np.arange(1 - n_pages, 1, dtype=np.float32) / np.float32(RECENT_PAGES)
        standing: Float = self._popularity[self.layer, :n_pages] + np.float32(RECENT) * np.exp(recent)
        return standing
