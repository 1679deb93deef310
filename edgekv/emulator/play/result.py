"""What came out of a scenario on a device, as plain data: equal inputs give equal bytes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.device_profiles.flash import TERABYTE, wear_bytes
from edgekv.runtime.pages.cache import KVCache
from edgekv.tiers import Tier

from ..device import Device
from .scenario import Scenario

#: Columns of the heat map at the most; beyond, neighbouring pages share one.
MAP_COLUMNS = 256


@dataclass
class TurnResult:
    """One turn. ``ttft_s`` is the time to the first token, None if none came; ``error`` is why it ended early.

    ``prompt_tokens``: new in this turn. ``computed_tokens``: of the whole conversation, those computed again or for the first
    time. ``decoded_tokens``, ``decode_s``: those of the answer that came one after another, without the first after a
    start.
    """

    began_s: float
    prompt_tokens: int = 0
    computed_tokens: int = 0
    answer_tokens: int = 0
    ttft_s: float | None = None
    decoded_tokens: int = 0
    decode_s: float = 0.0
    kills: int = 0
    error: str | None = None
    text: str | None = None

    @property
    def tokens_per_s(self) -> float:
        """Speed of the answer once it comes."""
        return self.decoded_tokens / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True)
class PageMap:
    """The pages at the end, [n_layers][columns]: the tier of each, and its share of the attention of its layer.

    ``tokens_per_column``: pages side by side that share a column have the coldest tier among them.
    """

    tokens_per_column: int
    tier: list[list[int]]
    use: list[list[float]]


@dataclass
class Result:
    """A scenario, the device, and what happened. ``model``, ``budget``: what ran, and how its budget was divided."""

    scenario: Scenario
    device: dict[str, Any]
    model: dict[str, Any]
    budget: dict[str, Any]
    turns: list[TurnResult] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, list[Any]] = field(default_factory=dict)
    pages: PageMap | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        data = dataclasses.asdict(self)
        for turn in data["scenario"]["turns"]:
            if turn["prompt"] is not None:
                turn["prompt"] = turn["prompt"][:80]
        for turn, plain in zip(self.turns, data["turns"], strict=True):
            plain["tokens_per_s"] = turn.tokens_per_s
        return data


def device_facts(device: Device) -> dict[str, Any]:
    """Return what the report says of the device."""
    memory, flash = device.profile.memory, device.profile.flash
    return {
        "name": device.profile.name,
        "title": device.profile.title,
        "app_limit_bytes": memory.app_limit_bytes.value,
        "kill": memory.kill,
        "flash_read_bytes_per_s": flash.read_bytes_per_s.value,
        "flash_write_bytes_per_s": flash.write_bytes_per_s.value,
        "endurance_tbw": flash.endurance_tbw.value,
    }


def totals(device: Device, turns: list[TurnResult]) -> dict[str, Any]:
    """Return the sums of a run: time, memory, speed, pages, flash."""
    drive, flash = device.medium.drive, device.profile.flash
    decoded = sum(turn.decoded_tokens for turn in turns)
    decode_s = sum(turn.decode_s for turn in turns)
    used = device.pages_used
    return {
        "seconds": device.clock.now,
        "busy_seconds": device.clock.busy_s,
        "peak_bytes": device.peak_bytes,
        "kills": sum(turn.kills for turn in turns),
        "errors": sum(turn.error is not None for turn in turns),
        "decode_tokens_per_s": decoded / decode_s if decode_s else 0.0,
        **{f"decode_{name}": value for name, value in device.timeline.decode_percentiles().items()},
        "speed_left": device.clock.heat.speed,
        "pages_used": used,
        "pages_fetched": device.pages_fetched,
        "hit_rate": 1 - device.pages_fetched / used if used else 1.0,
        "flash_reads": device.medium.reads,
        "flash_writes": device.medium.writes,
        "flash_faults": device.medium.faults,
        "bytes_read": drive.bytes_read,
        "bytes_written": drive.bytes_written,
        "bytes_programmed": wear_bytes(flash, drive.bytes_written),
        "wear_share": wear_bytes(flash, drive.bytes_written) / (flash.endurance_tbw.value * TERABYTE),
    }


def page_map(cache: KVCache) -> PageMap | None:
    """Return where the pages of a cache are and how much each was used; None when it holds none."""
    table, size = cache.table, cache.spec.page_size
    n_pages = max(table.n_pages(layer) for layer in range(cache.spec.n_layers))
    if not n_pages:
        return None
    per_column = -(-n_pages // MAP_COLUMNS)
    starts = np.arange(0, n_pages, per_column)
    tier = table.tier[:, :n_pages].astype(np.int64)
    tier[tier == Tier.FREE] = -1
    mass: NDArray[np.float64] = table.mass[:, :n_pages].astype(np.float64)
    total = np.maximum(mass.sum(axis=1, keepdims=True), 1e-30)
    use = np.add.reduceat(mass / total, starts, axis=1)
    return PageMap(
        per_column * size,
        np.maximum.reduceat(tier, starts, axis=1).tolist(),
        [[float(f"{value:.4g}") for value in row] for row in use.tolist()],
    )
