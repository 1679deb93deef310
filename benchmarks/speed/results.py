"""What a run measured, and how a bar is held against it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .contestants import CONFIGURATIONS, OURS, OURS_FP16

Line = dict[str, Any]
#: A measurement counts as quiet when others kept at most this many cores busy meanwhile.
QUIET = 0.15


@dataclass(frozen=True)
class Bar:
    """One bar: ``ratio`` is None when something was not measured."""

    measure: str
    ours: float | None
    theirs: float | None
    against: str
    bar: float
    at_most: bool = False
    direct: float | None = None

    @property
    def ratio(self) -> float | None:
        """Ours over theirs."""
        if self.direct is not None:
            return self.direct
        return self.ours / self.theirs if self.ours is not None and self.theirs else None

    @property
    def met(self) -> bool:
        """Whether the ratio reaches the bar."""
        return self.ratio is not None and (self.ratio <= self.bar if self.at_most else self.ratio >= self.bar)


class Results:
    """The lines of a run."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self.lines = list(lines)

    def get(self, name: str, context: int, key: str) -> float | None:
        """Return the median of a figure over the rounds: of the quiet ones, if there are any."""
        rows = [row for row in self.lines if row.get("name") == name and row.get("context") == context and key in row]
        rows = [row for row in rows if row["other_cpu"] <= QUIET] or rows
        return statistics.median(row[key] for row in rows) if rows else None

    def noisy(self, name: str, context: int) -> bool:
        """Whether no round of a configuration was quiet."""
        rows = [row for row in self.lines if row.get("name") == name and row.get("context") == context]
        return bool(rows) and all(row["other_cpu"] > QUIET for row in rows)

    def best_peer(
        self, context: int, key: str, *, least: bool = False, float_kv: bool = False
    ) -> tuple[float | None, str]:
        """Return the best figure of the peers that the bars name, and whose it is."""
        found = []
        for configuration in CONFIGURATIONS:
            if configuration.name in (OURS, OURS_FP16) or not configuration.in_bars:
                continue
            value = self.get(configuration.name, context, key)
            if value is not None and (configuration.float_kv or not float_kv):
                found.append((value, configuration.name))
        return (min if least else max)(found) if found else (None, "no peer was measured")

    def kernel(self, bench: str, key: str) -> float | None:
        """Return the median of a figure of the attention benchmark at 8192 tokens."""
        rows = [row for row in self.lines if row.get("bench") == bench and row.get("context") == 8192]
        return statistics.median(row[key] for row in rows) if rows else None
