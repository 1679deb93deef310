"""What a device saw, step by step: samples that never grow beyond a few thousand, and a log of events."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: Samples that are kept; when there are more, every second one goes, and half as many are taken from then on.
MOST_SAMPLES = 2000

COLUMNS = (
    "at_s", "step_s", "step_tokens", "tokens", "speed", "rss_bytes", "limit_bytes", "hot_bytes", "warm_bytes", "cold_bytes",
    "pages_used", "pages_fetched", "bytes_read", "bytes_written",
)  # fmt: skip


@dataclass(frozen=True)
class LogEntry:
    """Something that happened on the device at a virtual time."""

    at_s: float
    kind: str
    text: str


@dataclass
class Timeline:
    """Samples of :data:`COLUMNS`, one per step at the most, and what happened.

    ``at_s`` is the end of a step; pages and flash bytes are counted from the start of the device.
    """

    entries: list[LogEntry] = field(default_factory=list)
    decode_s: array[float] = field(default_factory=lambda: array("d"))
    _samples: list[tuple[float, ...]] = field(default_factory=list)
    _stride: int = 1
    _steps: int = 0

    @property
    def due(self) -> bool:
        """Whether the step that ends now is one to sample."""
        return self._steps % self._stride == 0

    def stepped(self, n_tokens: int, seconds: float) -> None:
        """A step of ``n_tokens`` ended; decode steps are those of one token."""
        self._steps += 1
        if n_tokens == 1:
            self.decode_s.append(seconds)

    def sample(self, *values: float) -> None:
        """Add a sample, in the order of :data:`COLUMNS`."""
        assert len(values) == len(COLUMNS)
        self._samples.append(values)
        if len(self._samples) > MOST_SAMPLES:
            self._samples = self._samples[1::2]
            self._stride *= 2

    def log(self, at_s: float, kind: str, text: str) -> None:
        """Add something that happened."""
        self.entries.append(LogEntry(at_s, kind, text))

    def columns(self) -> dict[str, list[Any]]:
        """Return the samples by column."""
        return {name: [sample[index] for sample in self._samples] for index, name in enumerate(COLUMNS)}

    def decode_percentiles(self) -> dict[str, float]:
        """Return the distribution of the seconds of decode steps; zeros without any."""
        seconds = np.array(self.decode_s) if len(self.decode_s) else np.zeros(1)
        p50, p99, most = (float(value) for value in np.percentile(seconds, [50, 99, 100]))
        return {"p50_s": p50, "p99_s": p99, "max_s": most}
