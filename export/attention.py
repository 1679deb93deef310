"""The attention seam lowered to stock operations, for the inline form; and what a step computes once for all layers.

The meaning is :func:`edgekv.seam.paged_attention`. Nothing is gathered: pages, recent tokens and the new tokens are
laid one after the other and attended to in one pass. Every size may be zero at run time except the new tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from edgekv.spec import ModelSpec, RopeSpec

Tensor = torch.Tensor

#: Stands for minus infinity in a masked score: far below any real score, and a row of them still gives no NaN.
MASKED = -1e30


class InlineAttention(nn.Module):
    """One layer's seam.

    Takes q [T, n_q_heads, head_dim], k and v [T, n_kv_heads, head_dim], the pages and the recent tokens as
    :func:`edgekv.contract.inline_spec` lays them out, slot_mask [T, S] and causal [T, T] bool.
    Returns attention [T, n_q_heads, head_dim] and page_mass [N].
    """

    def __init__(self, n_q_heads: int, n_kv_heads: int, head_dim: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.n_kv_heads, self.group, self.head_dim = n_kv_heads, n_q_heads // n_kv_heads, head_dim

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_pages: Tensor,
        key_scales: Tensor,
        value_pages: Tensor,
        value_scales: Tensor,
        recent_keys: Tensor,
        recent_values: Tensor,
        slot_mask: Tensor,
        causal: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Attend; see the class."""
        n_new, n_pages, page_size = q.shape[0], key_pages.shape[0], key_pages.shape[2]
        kv, dim = self.n_kv_heads, self.head_dim
        paged_k = key_pages.to(torch.float32) * key_scales.to(torch.float32).unsqueeze(2)
        paged_v = value_pages.to(torch.float32) * value_scales.to(torch.float32).unsqueeze(3)
        mask = torch.cat([slot_mask, causal], dim=1)

        def join(paged: Tensor, recent: Tensor, new: Tensor) -> Tensor:
            paged = paged.transpose(0, 1).reshape(kv, n_pages * page_size, dim)
            tail = torch.cat([recent.to(torch.float32), new], dim=0).transpose(0, 1)
            return torch.cat([paged, tail], dim=1)

        keys, values = join(paged_k, recent_keys, k), join(paged_v, recent_values, v)
        # A slot that nobody may see can hold anything, even NaN, and 0 * NaN is NaN.
        values = torch.where(mask.any(dim=0)[None, :, None], values, 0.0)
        queries = q.reshape(n_new, kv, self.group, dim).permute(1, 2, 0, 3).reshape(kv, self.group * n_new, dim)
        scores = torch.matmul(queries * self.scale, keys.transpose(1, 2))
        scores = scores.reshape(kv, self.group, n_new, keys.shape[1])
        weights = torch.softmax(torch.where(mask, scores, MASKED), dim=-1)
        out = torch.matmul(weights.reshape(kv, self.group * n_new, keys.shape[1]), values)
        out = out.reshape(kv, self.group, n_new, dim).permute(2, 0, 1, 3).reshape(n_new, kv * self.group, dim)
        slots = weights.sum(dim=(0, 1, 2))[: n_pages * page_size] / (kv * self.group * n_new)
        return out, slots.reshape(n_pages, page_size).sum(dim=1)


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
