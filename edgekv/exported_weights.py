"""How an export may be told to store weights: a kind, the source's own codes, or a budget of bits."""

from __future__ import annotations

from dataclasses import dataclass

from edgekv.contract import MIXED, STORED, WEIGHTS
from edgekv.settings import Real, Setting

#: N of ``mixed:N``: from what no int4 has on, to what int8 has with its scales.
_BITS = Real("bits", 4, 9)


@dataclass(frozen=True)
class ExportedWeights(Setting[str]):
    """A kind, ``stored``, or ``mixed:N`` with N bits a weight."""

    @property
    def wanted(self) -> str:  # noqa: D102
        return f"one of {', '.join((*WEIGHTS, STORED))}, or {MIXED}:N with N bits a weight such as {MIXED}:6"

    @property
    def metavar(self) -> str:  # noqa: D102
        return "|".join((*WEIGHTS, STORED, f"{MIXED}:N"))

    def _from_value(self, value: object) -> str | None:
        if isinstance(value, str) and (value in (*WEIGHTS, STORED) or self.mixed_bits(value) is not None):
            return value
        return None

    def mixed_bits(self, value: str) -> float | None:
        """Return N of ``mixed:N``; None: it is another word."""
        word, colon, bits = value.partition(":")
        return _BITS._from_text(bits) if colon and word == MIXED else None


EXPORTED_WEIGHTS = ExportedWeights("weights")
