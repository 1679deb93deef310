"""Cosine and sine of the rotary embedding, for the positions of one step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekv.spec import RopeSpec


class Rope:
    """Fills the ``cos`` and ``sin`` inputs of the split form; float32 throughout, as the checkpoints were trained."""

    def __init__(self, spec: RopeSpec) -> None:
        self._inv_freq = np.asarray(spec.inv_freq, np.float32)
        self._scaling = np.float32(spec.attention_scaling)

    def fill(self, positions: NDArray[np.int64], cos: NDArray[np.float32], sin: NDArray[np.float32]) -> None:
        """Write cosine and sine [T, rotary_dim / 2] of positions [T]."""
        angles = positions.astype(np.float32)[:, None] * self._inv_freq
        np.multiply(np.cos(angles), self._scaling, out=cos)
        np.multiply(np.sin(angles), self._scaling, out=sin)
