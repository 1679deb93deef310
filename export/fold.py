"""What a model type computes by scalars of its own, folded into the weights: the decoder stays one, and nothing costs time.

A decoder whose embedding rows ``e`` are multiplied by ``m`` has a residual stream ``r = m * e + s * d[0] + s * d[1] + ...`` of
what its layers add. Everything reads ``r`` through an RMSNorm, and ``norm(r, eps) = norm(r / m, eps / m ** 2)``: the stream is
kept in units of the embedding, ``r / m = e + (s / m) * d[0] + ...``. So rows are looked up as they are stored, a tied head has
the same bytes, and ``s / m`` goes into what writes to the stream: the projections, or the norms behind them (for epsilon see
:attr:`~edgekv.export.config.DecoderConfig.residual_eps`). What multiplies the logits goes into the last norm's gain, and
so does what divides them before their tanh.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import replace

import torch

from edgekv.spec import ModelSpec

from .codes import Codes
from .config import DecoderConfig
from .weight_files import Stored

#: What RoPE turns.
_TURNED = re.compile(r".*\.self_attn\.[qk]_proj\.(weight|bias)")
FINAL_NORM, FINAL_NORM_BIAS = "model.norm.weight", "model.norm.bias"
#: What writes to the residual stream, without and with norms behind the projections.
_PROJECTIONS = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias")
_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")


def fold_scales(config: DecoderConfig, location: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the decoder's tensors as it multiplies with them; one that nothing is folded into stays as it is stored."""
    writers = _PROJECTIONS if config.norms in ("before", "shared") else _NORMS
    assert config.norms != "behind" or config.embedding_scale == 1, "projections read the stream itself"
    written = config.residual_scale / config.embedding_scale
    scaled = config.logits_scale / (config.logits_cap or 1.0)
    folded = {}
    for name, stored in location.items():
        if config.interleaved_rope and _TURNED.fullmatch(name):
            stored = stored.rearranged(functools.partial(_halves_apart, config.model))
        offset = float(config.gains_from_one and name.endswith("norm.weight"))
        scale = scaled if name in (FINAL_NORM, FINAL_NORM_BIAS) else written if name.endswith(writers) else 1.0
        same = (offset, scale) == (0, 1)
        folded[name] = stored if same else _scaled(stored, offset, scale)
    return folded


def _halves_apart(model: ModelSpec, rows: torch.Tensor) -> torch.Tensor:
    """Return rows of queries or keys in the order in which RoPE turns channel i with channel i + half here.

    The checkpoint has the two side by side. Scores do not depend on the order of channels, if queries and keys have the same.
    """
    turned = torch.arange(model.rope.rotary_dim).view(-1, 2).T.reshape(-1)
    order = torch.cat([turned, torch.arange(model.rope.rotary_dim, model.head_dim)])
    return rows.reshape(-1, model.head_dim, *rows.shape[1:])[:, order].reshape(rows.shape)


def _scaled(stored: Stored, offset: float, scale: float) -> Stored:
    codes = None if offset else stored.codes and stored.codes.changed(functools.partial(Codes.scaled, factor=scale))
    return replace(stored, read=functools.partial(_read, stored, offset, scale), codes=codes)


def _read(stored: Stored, offset: float, scale: float) -> torch.Tensor:
    return ((stored.read().to(torch.float64) + offset) * scale).to(torch.float32)
