"""How far two next-token distributions are apart, position by position; and what that amounts to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Double = NDArray[np.float64]

#: Rows of logits that are compared at a time: a vocabulary of 150,000 takes 20 MB per copy.
BLOCK_ROWS = 16
#: Positions of a stretch: a fault in one page shows in the tokens that look at it, which stand together.
STRETCH = 32
#: Bins of the curve over the positions.
CURVE_BINS = 32


@dataclass(frozen=True)
class Summary:
    """What a span of positions amounts to. KL divergences are of the reference from the lane, in nats."""

    tokens: int
    perplexity: float
    reference_perplexity: float
    mean_kld: float
    p99_kld: float
    max_kld: float
    stretch_kld: float
    top1: float

    @property
    def perplexity_change(self) -> float:
        """Relative change of perplexity; 0.01 is one percent worse."""
        return self.perplexity / self.reference_perplexity - 1.0


@dataclass
class Divergence:
    """Collects per-position comparisons of one lane with the reference; NaN where nothing was compared."""

    n_tokens: int
    kld: Double = field(init=False)
    nll: Double = field(init=False)
    reference_nll: Double = field(init=False)
    same_top: Double = field(init=False)

    def __post_init__(self) -> None:
        self.kld, self.nll, self.reference_nll, self.same_top = (np.full(self.n_tokens, np.nan) for _ in range(4))

    def add(self, start: int, reference: Float, logits: Float, targets: NDArray[np.int64]) -> None:
        """Compare logits [T, vocab_size] at positions start, start + 1, ...

        Args:
            targets: the tokens that followed; one less than T at the end of the text.
        """
        for first in range(0, len(logits), BLOCK_ROWS):
            rows = slice(first, first + BLOCK_ROWS)
            p, q = log_softmax(reference[rows]), log_softmax(logits[rows])
            at = slice(start + first, start + first + len(p))
            with np.errstate(invalid="ignore", over="ignore"):
                self.kld[at] = np.maximum(np.sum(np.exp(p) * (p - q), axis=1), 0.0)
            self.same_top[at] = np.argmax(p, axis=1) == np.argmax(q, axis=1)
            known = targets[rows]
            row = np.arange(len(known))
            self.reference_nll[at.start : at.start + len(known)] = -p[row, known]
            self.nll[at.start : at.start + len(known)] = -q[row, known]

    def summary(self, start: int = 0, stop: int | None = None) -> Summary:
        """Summarise the positions [start, stop). A NaN in a logit makes every number NaN: it passes no gate."""
        span = slice(start, self.n_tokens if stop is None else stop)
        kld, scored = self.kld[span], slice(span.start, min(span.stop, self.n_tokens - 1))
        size = min(STRETCH, len(kld))
        stretches = np.convolve(kld, np.ones(size) / size, "valid")
        return Summary(
            tokens=len(kld),
            perplexity=_exp_mean(self.nll[scored]),
            reference_perplexity=_exp_mean(self.reference_nll[scored]),
            mean_kld=float(kld.mean()),
            p99_kld=float(np.quantile(kld, 0.99)),
            max_kld=float(kld.max()),
            stretch_kld=float(stretches.max()),
            top1=float(self.same_top[span].mean()),
        )

    def curve(self) -> list[tuple[int, float, float]]:
        """Return (first position, mean KLD, largest KLD) of up to CURVE_BINS equal spans."""
        edges = np.unique(np.linspace(0, self.n_tokens, CURVE_BINS + 1).astype(int))
        pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        return [(a, float(self.kld[a:b].mean()), float(self.kld[a:b].max())) for a, b in pairs]


def log_softmax(logits: Float) -> Double:
    """Return log probabilities [T, vocab_size] float64."""
    x: Double = logits.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        x -= x.max(axis=1, keepdims=True)
        x -= np.log(np.sum(np.exp(x), axis=1, keepdims=True))
    return x


def _exp_mean(nll: Double) -> float:
    mean = float(nll.mean()) if len(nll) else math.nan
    return math.exp(min(mean, 700.0))
