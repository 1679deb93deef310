"""The decoder, cut at every attention seam into dense segments.

One definition for both forms and every engine: :class:`Segment` ``l`` is the output projection and MLP of layer
``l - 1``, then the norm, QKV projection and RoPE of layer ``l``. The variants (QKV bias, QK-norm, layers without
RoPE, partial rotation) come from :class:`~edgekv.export.config.DecoderConfig`. Attention itself is not here: it is the
seam, between segments.
"""

from __future__ import annotations

import torch
from torch import nn

from edgekv.model_config import NormKind

from . import ops
from .checkpoint import Checkpoint
from .config import DecoderConfig

Tensor = torch.Tensor


#: By :attr:`DecoderConfig.activation`, the operation of :mod:`edgekv.export.ops` that multiplies gate and up projection. Without
#: a gate it has the activation's name.
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
    """A norm of a kind: gain weight [columns], and bias [columns] if it has one."""

    bias: nn.Parameter | None

    def __init__(self, columns: int, eps: float, kind: NormKind = "rms") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(columns))
        self.bias = nn.Parameter(torch.empty(columns)) if kind == "biased" else None
        self.eps, self.centred = eps, kind != "rms"

    def forward(self, x: Tensor) -> Tensor:
        """Norm x [..., columns]."""
        if self.centred:
            return ops.layer_norm(x, self.weight, self.bias, self.eps)
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of x + residual, and x + residual itself; all [T, columns]."""
        if self.centred:
            return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class Entry(nn.Module):
    """From a normed hidden state to the seam: QKV in one product, QK-norm, RoPE."""

    def __init__(self, config: DecoderConfig, *, rotated: bool) -> None:
        super().__init__()
        model = config.model
        self.widths = [heads * model.head_dim for heads in (model.n_q_heads, model.n_kv_heads, model.n_kv_heads)]
        self.heads = (model.n_q_heads, model.n_kv_heads)
        self.head_dim, self.rotated = model.head_dim, rotated
        self.qkv_proj = Projection(sum(self.widths), model.hidden_size, bias=config.qkv_bias)
        self.qk_norms = config.qk_norms
        widths = config.qk_norm_widths
        self.q_norm = Norm(widths["q_norm"], config.rms_eps) if widths else None
        self.k_norm = Norm(widths["k_norm"], config.rms_eps) if widths else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [T, n_q_heads, head_dim], k and v [T, n_kv_heads, head_dim]."""
        q, k, v = self.qkv_proj(x).split(self.widths, dim=-1)
        if self.qk_norms == "whole":
            q, k = self._normed(q, k)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.qk_norms == "heads":
            q, k = self._normed(q, k)
        if self.rotated:
            q, k = ops.rotary(q, cos, sin), ops.rotary(k, cos, sin)
        if self.qk_norms == "turned":
            q, k = self._normed(q, k)
        return q, k, v

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert self.q_norm is not None
        assert self.k_norm is not None
        return self.q_norm(q), self.k_norm(k)


class Exit(nn.Module):
    """From the seam to the end of the layer: output projection, norm, MLP. Returns what is still to be added.

    ``attention_norm`` and ``mlp_norm`` are of what attention and MLP add, ``post_norm`` of what the MLP reads; model types have
    the latter, the former, or both.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        model = config.model
        self.shared = config.norms == "shared"
        self.attention_norm = _norm_behind(config)
        self.mlp_norm = _norm_behind(config)
        self.o_proj = Projection(model.hidden_size, model.n_q_heads * model.head_dim, bias=config.output_bias)
        self.post_norm = _norm_before(config)
        gated = model.mlp_matrices == 3
        self.operation = GATED[config.activation] if gated else config.activation
        wide = (model.intermediate_size, model.hidden_size)
        self.gate_proj = Projection(*wide, bias=config.mlp_bias) if gated else None
        self.up_proj = Projection(*wide, bias=config.mlp_bias)
        self.down_proj = Projection(model.hidden_size, model.intermediate_size, bias=config.mlp_bias)

    def forward(self, residual: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the MLP adds and the residual it is added to, both [T, hidden]."""
        added = self._normed(self.attention_norm, self.o_proj(attention.flatten(1)))
        if self.shared and self.post_norm is not None:
            return added + self._mlp(self.post_norm(residual)), residual
        x, residual = _add(added, residual, self.post_norm)
        return self._normed(self.mlp_norm, self._mlp(x)), residual

    def _mlp(self, x: Tensor) -> Tensor:
        wide = [self.up_proj(x)] if self.gate_proj is None else [self.gate_proj(x), self.up_proj(x)]
        result: Tensor = self.down_proj(getattr(ops, self.operation)(*wide))
        return result

    def _normed(self, norm: Norm | None, added: Tensor) -> Tensor:
        return added if norm is None else norm(added)


def _norm_before(config: DecoderConfig) -> Norm | None:
    """Return the norm of what attention or an MLP reads from the residual stream, where the decoder has one."""
    if config.norms == "behind":
        return None
    return Norm(config.model.hidden_size, config.residual_eps, config.norm_kind)


def _norm_behind(config: DecoderConfig) -> Norm | None:
    """Return the norm of what attention or an MLP adds, where the decoder has one."""
    if config.norms not in ("behind", "around"):
        return None
    return Norm(config.model.hidden_size, config.rms_eps, config.norm_kind)


def _add(added: Tensor, residual: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """Return the sum, normed if there is a norm, and the sum itself; all [T, hidden]."""
    if norm is None:
        total = added + residual
        return total, total
    return norm.add(added, residual)


class FirstSegment(nn.Module):
    """(residual, cos, sin) -> (q, k, v); residual is the embedding rows."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm = _norm_before(config)
        self.entry = Entry(config, rotated=config.rotated[0])

    def forward(self, residual: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`edgekv.contract.segment_spec`."""
        x = residual if self.norm is None else self.norm(residual)
        q, k, v = self.entry(x, cos, sin)
        return q, k, v


class MiddleSegment(nn.Module):
    """(residual, attention, cos, sin) -> (next_residual, q, k, v)."""

    def __init__(self, config: DecoderConfig, *, rotated: bool) -> None:
        super().__init__()
        self.exit = Exit(config)
        self.norm = _norm_before(config)
        self.entry = Entry(config, rotated=rotated)

    def forward(
        self, residual: Tensor, attention: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :func:`edgekv.contract.segment_spec`."""
        delta, residual = self.exit(residual, attention)
        x, residual = _add(delta, residual, self.norm)
        q, k, v = self.entry(x, cos, sin)
        return residual, q, k, v


class LastSegment(nn.Module):
    """(residual, attention) -> logits."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.exit = Exit(config)
        self.norm = Norm(config.model.hidden_size, config.residual_eps, config.norm_kind)
        self.cap = config.logits_cap
        self.head = Projection(config.model.vocab_size, config.model.hidden_size, bias=False)

    def forward(self, residual: Tensor, attention: Tensor) -> Tensor:
        """See :func:`edgekv.contract.segment_spec`."""
        delta, residual = self.exit(residual, attention)
        x, _ = self.norm.add(delta, residual)
        logits: Tensor = self.head(x)
        return torch.tanh(logits) * self.cap if self.cap else logits


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
#: Where they differ in a layer with norms behind attention and MLP.
_BEHIND = {
    "exit.attention_norm": ("post_attention_layernorm",),
    "exit.post_norm": ("pre_feedforward_layernorm",),
}
#: Where they differ in a layer whose attention and MLP share a norm.
_SHARED = {"exit.post_norm": ("input_layernorm",)}
_ENTRY = {
    "norm": ("input_layernorm",),
    "entry.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "entry.q_norm": ("self_attn.q_norm",),
    "entry.k_norm": ("self_attn.k_norm",),
}


def parameter_sources(checkpoint: Checkpoint, index: int, parameter: str) -> tuple[str, ...]:
    """Return the checkpoint tensors that, stacked by rows, are ``parameter`` of segment ``index``."""
    owner, leaf = parameter.rsplit(".", 1)
    ends = _EXIT | {"before": {}, "shared": _SHARED, "behind": _BEHIND, "around": _BEHIND}[checkpoint.config.norms]
    if owner in ends:
        return tuple(f"model.layers.{index - 1}.{name}.{leaf}" for name in ends[owner])
    if index == checkpoint.config.model.n_layers:
        return (f"model.norm.{leaf}",) if owner == "norm" else (checkpoint.head,)
    return tuple(f"model.layers.{index}.{name}.{leaf}" for name in _ENTRY[owner])


def load_parameter(checkpoint: Checkpoint, index: int, parameter: str) -> Tensor:
    """Read ``parameter`` of segment ``index`` as float32."""
    parts = [checkpoint.tensor(name) for name in parameter_sources(checkpoint, index, parameter)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
