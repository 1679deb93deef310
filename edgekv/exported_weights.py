"""What may be said of how an export stores weights."""

from __future__ import annotations

from dataclasses import dataclass

from .contract import MIXED, STORED, WEIGHTS
from .settings import Real, Setting

#: From what no int4 has on, to what int8 has with its scales.
_MIXED_BITS = Real("bits", 4, 9)


@dataclass(frozen=True)
class ExportedWeights(Setting[str]):
    """How an export stores weights: a kind, ``stored``, or ``mixed:N`` with N bits a weight."""

    @property
    def wanted(self) -> str:  # noqa: D102
        return f"one of {', '.join((*WEIGHTS, STORED))}, or {MIXED}:N with N bits a weight such as {MIXED}:6"

    @property
    def metavar(self) -> str:  # noqa: D102
        return "|".join((*WEIGHTS, STORED, f"{MIXED}:N"))

    def _from_value(self, value: object) -> str | None:
        known = isinstance(value, str) and (value in (*WEIGHTS, STORED) or self.mixed_bits(value) is not None)
        return str(value) if known else None

    def mixed_bits(self, value: str) -> float | None:
        """Return N of ``mixed:N``; None: it is another word."""
        word, colon, bits = value.partition(":")
        return _MIXED_BITS._from_text(bits) if colon and word == MIXED else None


EXPORTED_WEIGHTS = ExportedWeights("weights")
