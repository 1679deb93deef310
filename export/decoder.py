"""The decoder, cut at every attention seam into dense segments.

One definition for both forms and every engine: :class:`Segment` ``l`` is the output projection and MLP of layer
``l - 1``, then the norm, QKV projection and RoPE of layer ``l``. The variants (QKV bias, QK-norm, layers without
RoPE, partial rotation) come from :class:`~edgekv.export.config.DecoderConfig`. Attention itself is not here: it is the
seam, between segments.
"""

from __future__ import annotations

import torch
from torch import nn

from . import ops
from .checkpoint import FINAL_NORM, Checkpoint
from .config import DecoderConfig

Tensor = torch.Tensor


#: By :attr:`DecoderConfig.activation`, the operation of :mod:`edgekv.export.ops` that multiplies gate and up projection.
GATED = {"silu": "swiglu", "gelu_tanh": "geglu"}


class Projection(nn.Module):
    """A linear layer: weight [rows, columns], and bias [rows] if it has one."""

    bias: nn.Parameter | None

    def __init__(self, rows: int, columns: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Project x [T, columns] to [T, rows]."""
        return ops.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """The gain of an RMSNorm: weight [columns]."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(columns))


class Entry(nn.Module):
    """From a normed hidden state to the seam: QKV in one product, QK-norm, RoPE."""

    def __init__(self, config: DecoderConfig, *, rotated: bool) -> None:
        super().__init__()
        model = config.model
        self.widths = [heads * model.head_dim for heads in (model.n_q_heads, model.n_kv_heads, model.n_kv_heads)]
        self.heads = (model.n_q_heads, model.n_kv_heads)
        self.head_dim, self.eps, self.rotated = model.head_dim, config.rms_eps, rotated
        self.qkv_proj = Projection(sum(self.widths), model.hidden_size, bias=config.qkv_bias)
        self.q_norm = Norm(model.head_dim) if config.qk_norm else None
        self.k_norm = Norm(model.head_dim) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [T, n_q_heads, head_dim], k and v [T, n_kv_heads, head_dim]."""
        q, k, v = self.qkv_proj(x).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = ops.rms_norm(q, self.q_norm.weight, self.eps), ops.rms_norm(k, self.k_norm.weight, self.eps)
        if self.rotated:
            q, k = ops.rotary(q, cos, sin), ops.rotary(k, cos, sin)
        return q, k, v


class Exit(nn.Module):
    """From the seam to the end of the layer: output projection, norm, gated MLP. Returns what is still to be added.

    ``attention_norm`` and ``mlp_norm``, which some model types have, are of what attention and MLP add.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        model = config.model
        self.eps, self.added_eps = config.residual_eps, config.rms_eps
        self.gated = GATED[config.activation]
        self.attention_norm = Norm(model.hidden_size) if config.sandwich_norms else None
        self.mlp_norm = Norm(model.hidden_size) if config.sandwich_norms else None
        self.o_proj = Projection(model.hidden_size, model.n_q_heads * model.head_dim, bias=config.output_bias)
        self.post_norm = Norm(model.hidden_size)
        self.gate_proj = Projection(model.intermediate_size, model.hidden_size, bias=config.mlp_bias)
        self.up_proj = Projection(model.intermediate_size, model.hidden_size, bias=config.mlp_bias)
        self.down_proj = Projection(model.hidden_size, model.intermediate_size, bias=config.mlp_bias)

    def forward(self, residual: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the MLP adds and the residual it is added to, both [T, hidden]."""
        added = self._normed(self.attention_norm, self.o_proj(attention.flatten(1)))
        x, residual = ops.add_rms_norm(added, residual, self.post_norm.weight, self.eps)
        gated = getattr(ops, self.gated)(self.gate_proj(x), self.up_proj(x))
        return self._normed(self.mlp_norm, self.down_proj(gated)), residual

    def _normed(self, norm: Norm | None, added: Tensor) -> Tensor:
        return added if norm is None else ops.rms_norm(added, norm.weight, self.added_eps)


class FirstSegment(nn.Module):
    """(residual, cos, sin) -> (q, k, v); residual is the embedding rows."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.eps = config.residual_eps
        self.norm = Norm(config.model.hidden_size)
        self.entry = Entry(config, rotated=config.rotated[0])

    def forward(self, residual: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`edgekv.contract.segment_spec`."""
        q, k, v = self.entry(ops.rms_norm(residual, self.norm.weight, self.eps), cos, sin)
        return q, k, v


class MiddleSegment(nn.Module):
    """(residual, attention, cos, sin) -> (next_residual, q, k, v)."""

    def __init__(self, config: DecoderConfig, *, rotated: bool) -> None:
        super().__init__()
        self.eps = config.residual_eps
        self.exit = Exit(config)
        self.norm = Norm(config.model.hidden_size)
        self.entry = Entry(config, rotated=rotated)

    def forward(
        self, residual: Tensor, attention: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :func:`edgekv.contract.segment_spec`."""
        delta, residual = self.exit(residual, attention)
        x, residual = ops.add_rms_norm(delta, residual, self.norm.weight, self.eps)
        q, k, v = self.entry(x, cos, sin)
        return residual, q, k, v


class LastSegment(nn.Module):
    """(residual, attention) -> logits."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.eps = config.residual_eps
        self.exit = Exit(config)
        self.norm = Norm(config.model.hidden_size)
        self.head = Projection(config.model.vocab_size, config.model.hidden_size, bias=False)

    def forward(self, residual: Tensor, attention: Tensor) -> Tensor:
        """See :func:`edgekv.contract.segment_spec`."""
        delta, residual = self.exit(residual, attention)
        x, _ = ops.add_rms_norm(delta, residual, self.norm.weight, self.eps)
        logits: Tensor = self.head(x)
        return logits


def segment_kind(config: DecoderConfig, index: int) -> str:
    """Name the structure of segment ``index``: segments of one kind differ in nothing but their weights."""
    if index == config.model.n_layers:
        return "last"
    kind = "first" if index == 0 else "middle"
    return kind if config.rotated[index] else f"{kind}_unrotated"


def build_segment(config: DecoderConfig, index: int) -> nn.Module:
    """Build segment ``index`` without values (on the meta device)."""
    with torch.device("meta"):
        if index == 0:
            return FirstSegment(config)
        if index == config.model.n_layers:
            return LastSegment(config)
        return MiddleSegment(config, rotated=config.rotated[index])


_EXIT = {
    "exit.o_proj": ("self_attn.o_proj",),
    "exit.post_norm": ("post_attention_layernorm",),
    "exit.mlp_norm": ("post_feedforward_layernorm",),
    "exit.gate_proj": ("mlp.gate_proj",),
    "exit.up_proj": ("mlp.up_proj",),
    "exit.down_proj": ("mlp.down_proj",),
}
#: Where they differ in a layer whose attention and MLP have norms on both sides.
_SANDWICH = {
    "exit.attention_norm": ("post_attention_layernorm",),
    "exit.post_norm": ("pre_feedforward_layernorm",),
}
_ENTRY = {
    "norm": ("input_layernorm",),
    "entry.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "entry.q_norm": ("self_attn.q_norm",),
    "entry.k_norm": ("self_attn.k_norm",),
}


def parameter_sources(checkpoint: Checkpoint, index: int, parameter: str) -> tuple[str, ...]:
    """Return the checkpoint tensors that, stacked by rows, are ``parameter`` of segment ``index``."""
    owner, leaf = parameter.rsplit(".", 1)
    ends = _EXIT | _SANDWICH if checkpoint.config.sandwich_norms else _EXIT
    if owner in ends:
        return tuple(f"model.layers.{index - 1}.{name}.{leaf}" for name in ends[owner])
    if index == checkpoint.config.model.n_layers:
        return (FINAL_NORM,) if owner == "norm" else (checkpoint.head,)
    return tuple(f"model.layers.{index}.{name}.{leaf}" for name in _ENTRY[owner])


def load_parameter(checkpoint: Checkpoint, index: int, parameter: str) -> Tensor:
    """Read ``parameter`` of segment ``index`` as float32."""
    parts = [checkpoint.tensor(name) for name in parameter_sources(checkpoint, index, parameter)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
