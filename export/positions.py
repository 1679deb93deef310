"""What a step of the inline form computes once for all layers."""

from __future__ import annotations

import torch
from torch import nn

from edgekv.spec import ModelSpec, RopeSpec

Tensor = torch.Tensor


class Positions(nn.Module):
    """Maps position_ids [T] -> cos, sin [T, rotary_dim / 2] and one causal mask [T, T] per distinct window."""

    inv_freq: Tensor

    def __init__(self, rope: RopeSpec, windows: list[int]) -> None:
        super().__init__()
        self.scaling, self.windows = rope.attention_scaling, windows
        self.register_buffer("inv_freq", torch.tensor(rope.inv_freq, dtype=torch.float32), persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, ...]:
        """Return cos, sin, and the masks in the order of ``windows``."""
        angles = position_ids.to(torch.float32)[:, None] * self.inv_freq
        distance = position_ids[:, None] - position_ids[None, :]
        masks = [distance >= 0 if not w else (distance >= 0) & (distance < w) for w in self.windows]
        return angles.cos() * self.scaling, angles.sin() * self.scaling, *masks


def distinct_windows(model: ModelSpec) -> list[int]:
    """Return the sliding windows that layers use, each once, in the order of the masks of :class:`Positions`."""
    return sorted(set(model.windows))
