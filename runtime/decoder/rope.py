"""Cosine and sine of the rotary embedding, for the positions of one step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekv.spec import RopeSpec

from ..engines.base import Float


class Rope:
    """Fills the ``cos`` and ``sin`` inputs of the split form; float32 throughout, as the checkpoints were trained."""

    def __init__(self, specs: Sequence[RopeSpec]) -> None:
        self._tables = [(np.asarray(spec.inv_freq, np.float32), np.float32(spec.attention_scaling)) for spec in specs]

    def fill(self, positions: NDArray[np.int64], cos: Sequence[Float], sin: Sequence[Float]) -> None:
        """Write cosine and sine [T, rotary_dim / 2] of positions [T], of each rope."""
        for (inv_freq, scaling), cosines, sines in zip(self._tables, cos, sin, strict=True):
            angles = positions.astype(np.float32)[:, None] * inv_freq
            np.multiply(np.cos(angles), scaling, out=cosines)
            np.multiply(np.sin(angles), scaling, out=sines)
