"""What a model type computes by scalars of its own, folded into the weights: the decoder stays one, and nothing costs time.

A decoder whose embedding rows ``e`` are multiplied by ``m`` has a residual stream ``r = m * e + s * d[0] + s * d[1] + ...`` of
what its layers add. Everything reads ``r`` through an RMSNorm, and ``norm(r, eps) = norm(r / m, eps / m ** 2)``: the stream is
kept in units of the embedding, ``r / m = e + (s / m) * d[0] + ...``. So rows are looked up as they are stored, a tied head has
the same bytes, and ``s / m`` goes into the projections that write to the stream (for epsilon see
:attr:`~edgekv.export.config.DecoderConfig.residual_eps`). What multiplies the logits goes into the last norm's gain.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch

from .config import DecoderConfig
from .weight_files import Stored

FINAL_NORM = "model.norm.weight"
#: The projections that write to the residual stream.
_WRITERS = (".self_attn.o_proj.weight", ".self_attn.o_proj.bias", ".mlp.down_proj.weight", ".mlp.down_proj.bias")


def fold_scales(config: DecoderConfig, location: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the decoder's tensors with the configuration's scales in them; one that no scale touches stays as it is stored."""
    written = config.residual_scale / config.embedding_scale
    return {
        name: _scaled(
            stored, config.logits_scale if name == FINAL_NORM else written if name.endswith(_WRITERS) else 1.0
        )
        for name, stored in location.items()
    }


def _scaled(stored: Stored, scale: float) -> Stored:
    return stored if scale == 1 else replace(stored, read=functools.partial(_read_scaled, stored, scale))


def _read_scaled(stored: Stored, scale: float) -> torch.Tensor:
    return (stored.read().to(torch.float64) * scale).to(torch.float32)
