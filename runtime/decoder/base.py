"""What one step of the decoder is, in either form."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Float

#: Which rows of logits a step must return.
Rows = Literal["none", "last", "all"]


class Forward(Protocol):
    """Runs new tokens through the model and adds their keys and values to the cache."""

    def step(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], rows: Rows) -> Float:
        """Return logits [R, vocab_size] float32, R = 0, 1 or T; valid until the next step."""
        ...
