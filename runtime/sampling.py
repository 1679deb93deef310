"""From logits to the next token, seeded and repeatable."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekv.bundle import SamplingSpec
from edgekv.errors import UsageError
from edgekv.schema import shown
from edgekv.settings import REPETITION_PENALTY, SEED, TEMPERATURE, TOP_K, TOP_P, check_all

_SETTINGS = (TEMPERATURE, TOP_K, TOP_P, REPETITION_PENALTY, SEED)


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep all tokens.

    ``repetition_penalty`` divides positive and multiplies negative logits of tokens already seen (Source: CTRL, arXiv
    1909.05858). ``seed``: equal seeds give equal text; None is another one each time.

    Raises:
        UsageError: a value has another type or is out of the range in :mod:`edgekv.settings`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @classmethod
    def of_model(cls, spec: SamplingSpec | None) -> SamplingOptions:
        """Return how the makers of a model sample, as its manifest says; None: greedily."""
        return cls() if spec is None else cls(spec.temperature, spec.top_k, spec.top_p, spec.repetition_penalty)

    def __post_init__(self) -> None:
        check_all(self, {setting.name: setting for setting in _SETTINGS}, optional=("seed",))


class Sampler:
    """Chooses tokens; equal seeds, positions and logits give equal tokens.

    The number that is drawn belongs to the seed and the position in the sequence, so a sequence that is resumed goes on as
    the one that never stopped, and does not use numbers twice.

    Attributes:
        seed: the one in use, also where the options have none.
    """

    def __init__(self, options: SamplingOptions) -> None:
        if not isinstance(options, SamplingOptions):
            raise UsageError(f"sampling must be SamplingOptions, not {shown(options)}")
        self._options = options
        self.seed = options.seed if options.seed is not None else secrets.randbits(48)

    def choose(self, logits: NDArray[np.float32], seen: Sequence[int]) -> int:
        """Return the next token.

        Args:
            logits: [vocab_size] float32; not changed.
            seen: all tokens before it, which the repetition penalty applies to.
        """
        options = self._options
        if options.repetition_penalty != 1.0 and len(seen):
            logits = logits.copy()
            known = np.unique(np.asarray(seen, np.int64))
            old, penalty = logits[known], np.float32(options.repetition_penalty)
            logits[known] = np.where(old > 0, old / penalty, old * penalty)
        if options.temperature == 0:
            return int(np.argmax(logits))
        scores = logits.astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny temperature is greedy
            scores = (scores - scores.max()) / options.temperature
        order = np.argsort(-scores, kind="stable")
        if options.top_k:
            order = order[: options.top_k]
        weights = np.exp(scores[order])
        weights /= weights.sum()
        if options.top_p < 1.0:
            # The token that crosses the limit stays in.
            keep = int(np.searchsorted(np.cumsum(weights), options.top_p)) + 1
            order, weights = order[:keep], weights[:keep] / weights[:keep].sum()
        random = np.random.Generator(np.random.Philox(key=self.seed, counter=len(seen))).random()
        drawn = int(np.searchsorted(np.cumsum(weights), random))
        return int(order[min(drawn, len(order) - 1)])
