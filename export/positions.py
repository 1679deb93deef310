"""What a step of the inline form computes once for all layers."""

from __future__ import annotations

import torch
from torch import nn

from edgekv.spec import ModelSpec

Tensor = torch.Tensor


class Positions(nn.Module):
    """Maps position_ids [T] -> cos, sin [T, rotary_dim / 2] per rope and one causal mask [T, T] per distinct window."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.windows = distinct_windows(model)
        self.scalings = [rope.attention_scaling for rope in model.ropes]
        for number, rope in enumerate(model.ropes):
            frequencies = torch.tensor(rope.inv_freq, dtype=torch.float32)
            self.register_buffer(f"inv_freq_{number}", frequencies, persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, ...]:
        """Return cos and sin in the order of ``ropes``, and the masks in the order of ``windows``."""
        turned = [part for pair in self.turned(position_ids) for part in pair]
        return (*turned, *self.masks(position_ids))

    def turned(self, position_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return cos and sin of each rope."""
        pairs = []
        for number, scaling in enumerate(self.scalings):
            angles = position_ids.to(torch.float32)[:, None] * self.get_buffer(f"inv_freq_{number}")
            pairs.append((angles.cos() * scaling, angles.sin() * scaling))
        return pairs

    def masks(self, position_ids: Tensor) -> list[Tensor]:
        """Return the mask of each window."""
        distance = position_ids[:, None] - position_ids[None, :]
        return [distance >= 0 if not w else (distance >= 0) & (distance < w) for w in self.windows]


def distinct_windows(model: ModelSpec) -> list[int]:
    """Return the sliding windows that layers use, each once, in the order of the masks of :class:`Positions`."""
    return sorted(set(model.windows))
