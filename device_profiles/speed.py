"""How long a device takes for the work of one step.

The model is a roofline per engine and weight type, with a rate of its own for each kind of work:

    step = max(weight bytes / weight_read_bytes_per_s, ops / gemm_ops_per_s)
         + max(KV bytes / kv_read_bytes_per_s + fp16 KV bytes / kv_fp16_read_bytes_per_s, attention ops / attention_ops_per_s)
         + overhead_s

The rates are what an engine reaches, not what a data sheet promises: attention reads the cache at 10-60 % of the bandwidth that
the weights are read with, and quantised kernels may be bound by unpacking.
"""

from __future__ import annotations

from dataclasses import dataclass

from .schema import Compute, Flash
from .work import StepWork

#: Linux reads so much of a mapped or swapped file at a time (``read_ahead_kb``, 128 by default).
READAHEAD_BYTES = 128 * 1024


@dataclass(frozen=True)
class StepSeconds:
    """The parts of a step's time, in seconds."""

    dense: float
    attention: float
    overhead: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.dense + self.attention + self.overhead


def step_seconds(work: StepWork, rates: Compute, speed: float = 1.0) -> StepSeconds:
    """Return the time of a step whose data is all in RAM.

    Args:
        rates: of one engine and weight type: :meth:`DeviceProfile.rates`.
        speed: share of the cold speed that heat has left; see :mod:`edgekv.device_profiles.thermal`.
    """
    dense = max(work.weight_bytes / rates.weight_read_bytes_per_s.value, work.ops / rates.gemm_ops_per_s.value)
    read = work.kv_bytes / rates.kv_read_bytes_per_s.value
    read += work.kv_fp16_bytes / rates.kv_fp16_read_bytes_per_s.value
    attention = max(read, work.attention_ops / rates.attention_ops_per_s.value)
    return StepSeconds(dense / speed, attention / speed, rates.overhead_s.value / speed)


def paged_seconds(touched_bytes: float, limit_bytes: float, flash: Flash) -> float:
    """Return the time that paging adds to a step under ``swap``: nothing while all that a step touches fits, else the cliff.

    A step touches its bytes in the same order as the step before. The least recently used is then always what is needed next:
    hardly any hit is left, and every byte comes from flash again, at ``READAHEAD_BYTES`` a time.
    """
    if touched_bytes <= limit_bytes:
        return 0.0
    requests = touched_bytes / READAHEAD_BYTES
    return requests * flash.read_t0_s.value + touched_bytes / flash.read_bytes_per_s.value
