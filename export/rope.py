"""Rotary position embedding: every scaling variant of a Hugging Face config folded into plain frequencies.

The arithmetic is float32 in the order that `transformers` uses, so that angles agree to the last bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from edgekv.errors import CheckpointError
from edgekv.spec import RopeSpec

DEFAULT_THETA = 10000.0
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def read_rope(config: dict[str, Any], head_dim: int, max_context: int) -> RopeSpec:
    """Fold the rope settings of a Hugging Face ``config`` into frequencies.

    Both spellings are read: ``rope_parameters`` (transformers 5) and ``rope_theta`` with ``rope_scaling``.

    Raises:
        CheckpointError: a rope type that is not supported, or a setting that is missing.
    """
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if settings and all(isinstance(value, dict) for value in settings.values()):
        raise CheckpointError(
            "config.json has a rope setting per layer type; edgekv exports models with one rope for all layers"
        )
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"rope type {kind!r} is not supported; edgekv exports {', '.join(ROPE_TYPES)}")
    theta = float(settings.get("rope_theta", config.get("rope_theta", DEFAULT_THETA)))
    partial = float(settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))
    dim = int(head_dim * partial)
    if dim < 2 or dim % 2:
        raise CheckpointError(f"partial_rotary_factor {partial} leaves {dim} channels of {head_dim}; it must be even")
    channels = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32)
    inv_freq = 1.0 / (theta ** (channels / dim))
    scaling = 1.0
    try:
        if kind == "linear":
            inv_freq = inv_freq / float(settings["factor"])
        elif kind == "llama3":
            inv_freq = _llama3(inv_freq, settings)
        elif kind == "yarn":
            inv_freq, scaling = _yarn(inv_freq, theta, dim, max_context, settings)
    except KeyError as error:
        raise CheckpointError(f"config.json: rope type {kind!r} needs {error.args[0]!r} and it is missing") from error
    return RopeSpec(tuple(inv_freq.tolist()), scaling)


def _llama3(inv_freq: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    factor, low = float(settings["factor"]), float(settings["low_freq_factor"])
    high, original = float(settings["high_freq_factor"]), settings["original_max_position_embeddings"]
    wavelen = 2 * math.pi / inv_freq
    scaled = torch.where(wavelen > original / low, inv_freq / factor, inv_freq)
    smooth = (original / wavelen - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelen < original / high) & ~(wavelen > original / low)
    return torch.where(medium, smoothed, scaled)


def _yarn(
    inv_freq: torch.Tensor, theta: float, dim: int, max_context: int, settings: dict[str, Any]
) -> tuple[torch.Tensor, float]:
    """Source: YaRN, arXiv 2309.00071, section 3."""
    factor = float(settings["factor"])
    original = settings.get("original_max_position_embeddings") or max_context

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention = settings.get("attention_factor")
    if attention is None:
        if settings.get("mscale") and settings.get("mscale_all_dim"):
            attention = mscale(factor, settings["mscale"]) / mscale(factor, settings["mscale_all_dim"])
        else:
            attention = mscale(factor)

    def correction(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low = correction(settings.get("beta_fast") or 32)
    high = correction(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    return inv_freq / factor * (1 - keep) + inv_freq * keep, float(attention)
