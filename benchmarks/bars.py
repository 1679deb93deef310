"""The bars of the benchmark: what each compares, what it must reach, and what a run reached."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bars_executorch import executorch_bars
from configurations import CONFIGURATIONS, OURS, OURS_FP16

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


def bars(results: Results) -> list[Bar]:
    """Return every bar with what the run reached."""
    found = []
    for measure, against, bench, key, bar in (
        ("decode attention, INT8, 8192", "ONNX Runtime GQA INT8", "attention_decode", "over_ort_int8", 1 / 3),
        ("decode attention, INT8, 8192", "reading those bytes", "attention_decode", "over_read", 1.5),
        ("prefill attention, 256 at 8192", "ONNX Runtime GQA fp32", "attention_prefill", "over_ort_fp32", 1.0),
    ):
        found.append(Bar(measure, None, None, against, bar, at_most=True, direct=results.kernel(bench, key)))
    for context, bar in ((512, 1.0), (2048, 1.2), (8192, 1.6)):
        ours = results.get(OURS, context, "decode_tok_s")
        found.append(Bar(f"decode tok/s, {context}", ours, *results.best_peer(context, "decode_tok_s"), bar))
    for context in (2048, 8192):
        ours = results.get(OURS, context, "prefill_tok_s")
        theirs = results.best_peer(context, "prefill_tok_s", float_kv=True)
        found.append(Bar(f"prefill tok/s, {context}", ours, *theirs, 0.95))
    ours, fp16 = results.get(OURS, 2048, "prefill_tok_s"), results.get(OURS_FP16, 2048, "prefill_tok_s")
    found.append(Bar("prefill tok/s, 2048, INT8 pages", ours, fp16, OURS_FP16, 0.97))
    for context in (2048, 8192):
        ours = results.get(OURS, context, "peak_rss_mb")
        theirs = results.best_peer(context, "peak_rss_mb", least=True)
        found.append(Bar(f"peak RSS MB, {context}", ours, *theirs, 0.85, at_most=True))
    found += executorch_bars(results)
    for context in (512, 2048):
        rest, total = results.get(OURS, context, "rest_ms"), results.get(OURS, context, "profiled_ms")
        found.append(Bar(f"page manager and Python, ms, {context}", rest, total, "the whole token", 0.08, at_most=True))
    return found
