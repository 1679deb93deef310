"""What the parts of a step cost a device, in seconds of a cold one; the formulas are those of the device profiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from edgekv.device_profiles.geometry import Geometry
from edgekv.device_profiles.schema import Compute, DeviceProfile
from edgekv.device_profiles.work import BITS_PER_WEIGHT
from edgekv.runtime.kernels.interface import KIND_HOT, KIND_WARM, Int64, Refs
from edgekv.spec import PageSpec


@dataclass(frozen=True, eq=False)
class Pieces:
    """How the pages of some layers, one layer after another, are cut: where each piece starts, and which pages are on flash.

    ``starts`` [n_pieces], ``cold`` [n_cold]: indices into the pages of all these layers.
    """

    starts: Int64
    cold: Int64


@functools.lru_cache(maxsize=4)
def whole_layers(n_layers: int, n_pages: int) -> Pieces:
    """Return layers that are not cut, with all their pages in RAM."""
    return Pieces(np.arange(n_layers) * n_pages, np.empty(0, np.int64))


@dataclass(frozen=True)
class StepCost:
    """Prices a step in the pieces in which the runtime runs it: segment by segment, and attention by pieces of pages.

    Summed over a step, this is :func:`edgekv.device_profiles.speed.step_seconds`.
    """

    model: Geometry
    pages: PageSpec
    rates: Compute
    bits_per_weight: float

    @classmethod
    def of(cls, profile: DeviceProfile, model: Geometry, engine: str, weights: str, page_size: int) -> StepCost:
        """Price the steps of a model on a device.

        Raises:
            ProfileError: the profile has no numbers for the engine.
        """
        pages = PageSpec(model.n_kv_layers, model.n_kv_heads, model.head_dim, page_size)
        return cls(model, pages, profile.rates(engine, weights), BITS_PER_WEIGHT[engine][weights])

    def dense(self, read: float, multiplied: float, n_tokens: int) -> float:
        """Return the seconds in which ``n_tokens`` rows are each multiplied with so many weights, of so many that are read."""
        bytes_read = read * self.bits_per_weight / 8
        return max(
            bytes_read / self.rates.weight_read_bytes_per_s.value,
            2.0 * multiplied * n_tokens / self.rates.gemm_ops_per_s.value,
        )

    def segment(self, n_tokens: int) -> float:
        """Return the seconds of one segment but the last, with its share of what a step costs whatever the model.

        A segment ends where a layer attends; layers of linear attention are parts of the segments around them.
        """
        model = self.model
        mlp = min(model.mlp_weights, n_tokens * model.mlp_active_weights)
        read = model.mixing_weights + model.n_layers * mlp
        multiplied = model.mixing_weights + model.n_layers * model.mlp_active_weights
        state_s = 2.0 * model.linear.count * model.linear.state_bytes / self.rates.kv_read_bytes_per_s.value
        step_s = self.rates.overhead_s.value + state_s
        return (
            self.dense(read / model.n_kv_layers, multiplied / model.n_kv_layers, n_tokens) + step_s / model.n_kv_layers
        )

    def head(self, rows: int) -> float:
        """Return the seconds of the last segment for ``rows`` of logits."""
        return self.dense(self.model.head_weights, self.model.head_weights, rows) if rows else 0.0

    @functools.cached_property
    def slot_bytes(self) -> tuple[float, float]:
        """Bytes of one slot of a page of one layer, by the kind of page: KIND_HOT, KIND_WARM."""
        return self.pages.hot_bytes / self.pages.page_size, self.pages.warm_bytes / self.pages.page_size

    def attention(self, hot: float, warm: float, pairs: float) -> float:
        """Return the seconds in which one layer attends.

        Args:
            hot, warm: slots that are read of fp16 and of INT8 pages. pairs: of a query and a key.
        """
        read = hot * self.slot_bytes[KIND_HOT] / self.rates.kv_fp16_read_bytes_per_s.value
        read += warm * self.slot_bytes[KIND_WARM] / self.rates.kv_read_bytes_per_s.value
        ops = 4.0 * self.model.n_q_heads * self.model.head_dim * pairs
        return max(read, ops / self.rates.attention_ops_per_s.value)

    def fetch(self, pages: int, pieces: int = 1) -> float:
        """Return the seconds of the host to take pages from flash."""
        return pages * self.rates.page_fetch_s.value + pieces * self.rates.piece_fetch_s.value

    def pages_seconds(self, refs: Refs, n_tokens: int, first_position: int) -> tuple[float, int]:
        """Return the seconds to attend to pages, and how many of them are not skipped.

        Args:
            first_position: pages that end before it are outside the window.
        """
        wanted = refs["data"] != 0
        if first_position > 0:
            wanted &= refs["position"] + self.pages.page_size > first_position
        hot, warm = np.bincount(refs["kind"], refs["n_slots"] * wanted, 2).tolist()
        return self.attention(hot, warm, n_tokens * (hot + warm)), int(np.count_nonzero(wanted))

    def pieces_slots(
        self, refs: Refs, pieces: Pieces, first_positions: Int64 | None = None
    ) -> tuple[list[int], list[int], int]:
        """Count what is read of the pages ``refs`` [n_layers, n_pages] of some layers.

        Args:
            refs: in RAM, or among those on flash that ``pieces`` names.
            first_positions: [n_layers]; a layer's pages that end before it are outside its window.

        Returns:
            for each piece its slots, and those of them that are fp16; the number of pages.
        """
        if not refs.size:
            return [0] * len(pieces.starts), [0] * len(pieces.starts), 0
        slots = refs["n_slots"].reshape(-1)
        count = int(np.count_nonzero(slots))
        if first_positions is not None:
            inside = refs["position"] + self.pages.page_size > first_positions[:, None]
            slots, count = slots * inside.reshape(-1), int(np.count_nonzero(inside))
        hot = slots * (refs["kind"].reshape(-1) == KIND_HOT)
        if len(pieces.cold):
            hot[pieces.cold] = 0
        return (
            np.add.reduceat(slots, pieces.starts, dtype=np.int64).tolist(),
            np.add.reduceat(hot, pieces.starts, dtype=np.int64).tolist(),
            count,
        )

    def token_attention(self, slots: int, hot: int) -> float:
        """Return the seconds in which one token attends to so many slots of a layer, of which so many are fp16."""
        return self.attention(hot, slots - hot, slots)
