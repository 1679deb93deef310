"""Rotary position embedding: every scaling variant folded into plain frequencies.

The arithmetic is float32 in the order that `transformers` uses, so that angles agree to the last bit.
"""

from __future__ import annotations

import math

import torch

from edgekv.errors import CheckpointError
from edgekv.model_config import RopeSettings
from edgekv.spec import RopeSpec


def fold_rope(rope: RopeSettings, max_context: int) -> RopeSpec:
    """Fold rotary settings into frequencies.

    Args:
        max_context: the most tokens of a text, which decides between the factors of longrope.

    Raises:
        CheckpointError: they give angles that are not finite.
    """
    channels = torch.arange(0, rope.dim, 2, dtype=torch.int64).to(torch.float32)
    inv_freq = 1.0 / (rope.theta ** (channels / rope.dim))
    scaling = 1.0
    if rope.kind == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.kind == "llama3":
        inv_freq = _llama3(inv_freq, rope)
    elif rope.kind == "yarn":
        inv_freq, scaling = _yarn(rope)
    elif rope.kind == "longrope":
        inv_freq, scaling = _longrope(rope, long=max_context > rope.original_context)
    if not torch.isfinite(inv_freq).all() or not math.isfinite(scaling):
        raise CheckpointError(f"config.json: the {rope.kind} rope settings give angles that are not finite; check them")
    return RopeSpec(tuple(inv_freq.tolist()), scaling)


def _llama3(inv_freq: torch.Tensor, rope: RopeSettings) -> torch.Tensor:
    factor, low, high, original = rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_context
    wavelen = 2 * math.pi / inv_freq
    scaled = torch.where(wavelen > original / low, inv_freq / factor, inv_freq)
    smooth = (original / wavelen - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelen < original / high) & ~(wavelen > original / low)
    return torch.where(medium, smoothed, scaled)


def _longrope(rope: RopeSettings, *, long: bool) -> tuple[torch.Tensor, float]:
    """Source: LongRoPE, arXiv 2402.13753."""
    scaling = rope.attention_factor
    if scaling is None:
        grown = rope.factor > 1
        scaling = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_context)) if grown else 1.0
    factors = torch.tensor(rope.long_factor if long else rope.short_factor, dtype=torch.float32)
    channels = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    return 1.0 / (factors * rope.theta**channels), scaling


def _yarn(rope: RopeSettings) -> tuple[torch.Tensor, float]:
    """Source: YaRN, arXiv 2309.00071, section 3."""

    def mscale(weight: float = 1.0) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    attention = rope.attention_factor
    if attention is None:
        both = rope.mscale and rope.mscale_all_dim
        attention = mscale(rope.mscale) / mscale(rope.mscale_all_dim) if both else mscale()

    def correction(rotations: float) -> float:
        positions = rope.original_context / (rotations * 2 * math.pi)
        return (rope.dim * math.log(positions)) / (2 * math.log(rope.theta))

    low, high = correction(rope.beta_fast), correction(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    positions = rope.theta ** (torch.arange(0, rope.dim, 2).to(torch.float32) / rope.dim)
    return 1.0 / (rope.factor * positions) * (1 - keep) + 1.0 / positions * keep, float(attention)
