"""How much memory a device leaves for the KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgekv.errors import BudgetError, UsageError
from edgekv.sizes import format_bytes

from .schema import DeviceProfile


@dataclass(frozen=True)
class KVBudget:
    """The memory of one process, in parts. ``kv_bytes`` is what remains for the page arena."""

    profile: str
    app_limit_bytes: int
    weights_bytes: int
    runtime_overhead_bytes: int
    headroom_bytes: int

    @property
    def kv_bytes(self) -> int:
        """Bytes left for the KV cache."""
        return self.app_limit_bytes - self.weights_bytes - self.runtime_overhead_bytes - self.headroom_bytes

    def parts(self) -> list[tuple[str, int]]:
        """Return (label, bytes) rows that sum to the last one; what is taken away is negative."""
        return [
            ("app limit", self.app_limit_bytes),
            ("weights", -self.weights_bytes),
            ("runtime", -self.runtime_overhead_bytes),
            ("headroom", -self.headroom_bytes),
            ("KV cache", self.kv_bytes),
        ]

    def __str__(self) -> str:
        """Print the parts as a sum."""
        (first, limit), *taken, (last, left) = self.parts()
        minus = "".join(f" - {label} {format_bytes(-size)}" for label, size in taken)
        return f"{first} {format_bytes(limit)}{minus} = {last} {format_bytes(left)}"


def kv_budget(profile: DeviceProfile, weights_bytes: int, runtime_overhead_bytes: int) -> KVBudget:
    """Return what the app limit leaves for the KV cache.

    Args:
        profile: the device.
        weights_bytes: resident weights.
        runtime_overhead_bytes: the rest of the process: interpreter, engine, activations, tokenizer.

    Raises:
        BudgetError: nothing is left; the message lists the parts and the way out.
        UsageError: a size is negative.
    """
    for label, size_bytes in (("weights_bytes", weights_bytes), ("runtime_overhead_bytes", runtime_overhead_bytes)):
        if size_bytes < 0:
            raise UsageError(f"{label} must not be negative, but is {size_bytes}")
    limit_bytes = profile.memory.app_limit_bytes.value
    headroom_bytes = math.ceil(profile.memory.headroom_share.value * limit_bytes)
    budget = KVBudget(profile.name, limit_bytes, weights_bytes, runtime_overhead_bytes, headroom_bytes)
    if budget.kv_bytes <= 0:
        raise BudgetError(
            f"{profile.name} has no memory left for the KV cache: {budget}; "
            "use smaller weights (--weights int4), a smaller model or a device with more memory"
        )
    return budget
