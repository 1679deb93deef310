"""What a cache and a run did, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from .attention.select import SelectionStats
from .governor import PressureStats
from .pages.counters import CacheStats, CacheUse
from .storage.interface import StoreCounters


@dataclass
class RunStats:
    """What a run did. Times in seconds; ``decode_tokens`` counts tokens after the first."""

    load_seconds: float = 0.0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    reused_tokens: int = 0
    unused_prefix_tokens: int = 0  #: of a cached prefix that fits, but is of INT8 pages where the run keeps fp16
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    seed: int | None = None  #: of the last answer; None where it was greedy
    finish_reason: str | None = (
        None  #: of the last answer: ``stop`` (end of sequence, stop string), ``length``; None: cut off
    )
    answer_tokens: int = 0  #: of the last answer: how many were generated
    context_full: bool = False  #: the last answer ended where the context does
    peak_rss_bytes: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    remote_bytes_written: int = 0
    remote_bytes_read: int = 0
    cache: CacheUse | None = None
    pages: CacheStats | None = None
    selection: SelectionStats | None = None
    pressure: PressureStats | None = None

    def count(self, counters: StoreCounters) -> None:
        """Take over what the store of the run has counted."""
        self.bytes_written = counters.bytes_written
        self.bytes_read = counters.bytes_read
        self.remote_bytes_written = counters.remote_bytes_written
        self.remote_bytes_read = counters.remote_bytes_read

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens computed per second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens per second, without the first."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0
