"""The decoder's few operations, each with its meaning in torch and its node in ONNX.

Every op is defined by stock torch operations, so a decoder made of them runs eagerly and decomposes for any engine
(``ExportedProgram.run_decompositions()``). The ONNX exporter keeps them whole and emits one fused node for each:
:data:`ONNX_TRANSLATIONS` is its table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from onnx.defs import OpSchema
from onnxscript import opset21 as op
from onnxscript.values import Op, Opset

Tensor = torch.Tensor

_LIBRARY = torch.library.Library("edgekv", "DEF")  # type: ignore[no-untyped-call]


def _define(signature: str, meaning: Callable[..., Any]) -> None:
    name = signature.split("(")[0]
    _LIBRARY.define(signature)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, meaning, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, weight, eps), total


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _layer_norm(total, weight, bias, eps), total


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _relu2(x: Tensor) -> Tensor:
    above = F.relu(x)
    return above * above


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear)
_define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm)
_define("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)", _add_rms_norm)
_define("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor", _layer_norm)
_define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    _add_layer_norm,
)
_define("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor", _rotary)
_define("swiglu(Tensor gate, Tensor up) -> Tensor", _swiglu)
_define("geglu(Tensor gate, Tensor up) -> Tensor", _geglu)
_define("relu2(Tensor x) -> Tensor", _relu2)
_define("gelu_tanh(Tensor x) -> Tensor", _gelu_tanh)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Project x [T, K] with weight [N, K] and bias [N] to [T, N]."""
    result: Tensor = torch.ops.edgekv.linear(x, weight, bias)
    return result


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale x [..., K] to unit root mean square, then by weight [K]."""
    result: Tensor = torch.ops.edgekv.rms_norm(x, weight, eps)
    return result


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, and x + residual itself; all [T, K]."""
    normed, total = torch.ops.edgekv.add_rms_norm(x, residual, weight, eps)
    return normed, total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Scale what of x [..., K] differs from the mean to unit variance, then by weight [K], and add bias [K]."""
    result: Tensor = torch.ops.edgekv.layer_norm(x, weight, bias, eps)
    return result


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, and x + residual itself; all [T, K]."""
    normed, total = torch.ops.edgekv.add_layer_norm(x, residual, weight, bias, eps)
    return normed, total


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i with channel i + half of x [T, heads, head_dim]; cos and sin are [T, half]."""
    result: Tensor = torch.ops.edgekv.rotary(x, cos, sin)
    return result


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, both [T, K]."""
    result: Tensor = torch.ops.edgekv.swiglu(gate, up)
    return result


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return gelu(gate) * up, both [T, K]; gelu in its tanh approximation."""
    result: Tensor = torch.ops.edgekv.geglu(gate, up)
    return result


def relu2(x: Tensor) -> Tensor:
    """Return the square of what is above 0 of x [T, K], and 0 for the rest."""
    result: Tensor = torch.ops.edgekv.relu2(x)
    return result


def gelu_tanh(x: Tensor) -> Tensor:
    """Return gelu(x) of x [T, K] in its tanh approximation."""
    result: Tensor = torch.ops.edgekv.gelu_tanh(x)
    return result


def _contrib(domain: str, name: str, n_inputs: int, n_outputs: int, **attributes: OpSchema.AttrType) -> Op:
    """Describe an ONNX Runtime operator that the onnx package does not know."""
    optional = OpSchema.FormalParameterOption.Optional
    schema = OpSchema(
        name,
        domain,
        1,
        inputs=[OpSchema.FormalParameter(f"i{i}", f"T{i}", param_option=optional) for i in range(n_inputs)],
        outputs=[OpSchema.FormalParameter(f"o{i}", "T0", param_option=optional) for i in range(n_outputs)],
        type_constraints=[(f"T{i}", ["tensor(float)", "tensor(int64)"], "") for i in range(n_inputs)],
        attributes=[OpSchema.Attribute(key, kind, "", required=False) for key, kind in attributes.items()],
    )
    return Op(Opset(domain, 1), name, schema)


_FLOAT, _INT = OpSchema.AttrType.FLOAT, OpSchema.AttrType.INT
_norm = _contrib("", "SimplifiedLayerNormalization", 2, 1, axis=_INT, epsilon=_FLOAT)
_skip_norm = _contrib("com.microsoft", "SkipSimplifiedLayerNormalization", 3, 4, epsilon=_FLOAT)
_whole_norm = _contrib("", "LayerNormalization", 3, 1, axis=_INT, epsilon=_FLOAT)
_skip_layer_norm = _contrib("com.microsoft", "SkipLayerNormalization", 5, 4, epsilon=_FLOAT)
_rotate = _contrib("com.microsoft", "RotaryEmbedding", 4, 1, num_heads=_INT, rotary_embedding_dim=_INT)
_silu = _contrib("com.microsoft", "QuickGelu", 1, 1, alpha=_FLOAT)
_fast_gelu = _contrib("com.microsoft", "FastGelu", 1, 1)


def _onnx_linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return op.Gemm(x, weight, transB=1) if bias is None else op.Gemm(x, weight, bias, transB=1)


def _onnx_rms_norm(x: Any, weight: Any, eps: float) -> Any:
    return _norm(x, weight, axis=-1, epsilon=eps)


def _onnx_add_rms_norm(x: Any, residual: Any, weight: Any, eps: float) -> Any:
    normed, _, _, total = _skip_norm(x, residual, weight, epsilon=eps)
    return normed, total


def _onnx_layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return _whole_norm(x, weight, bias, axis=-1, epsilon=eps)


def _onnx_add_layer_norm(x: Any, residual: Any, weight: Any, bias: Any, eps: float) -> Any:
    normed, _, _, total = _skip_layer_norm(x, residual, weight, bias, None, epsilon=eps)
    return normed, total


def _onnx_rotary(x: Any, cos: Any, sin: Any) -> Any:
    heads, head_dim, rotary_dim = x.shape[1], x.shape[2], 2 * cos.shape[1]
    flat = op.Reshape(x, op.Constant(value_ints=[1, -1, heads * head_dim]))
    partial = {} if rotary_dim == head_dim else {"rotary_embedding_dim": rotary_dim}
    turned = _rotate(flat, op.Constant(value_ints=[0]), cos, sin, num_heads=heads, **partial)
    return op.Reshape(turned, op.Constant(value_ints=[-1, heads, head_dim]))


def _onnx_swiglu(gate: Any, up: Any) -> Any:
    return op.Mul(_silu(gate, alpha=1.0), up)


def _onnx_geglu(gate: Any, up: Any) -> Any:
    return op.Mul(_fast_gelu(gate), up)


def _onnx_relu2(x: Any) -> Any:
    above = op.Relu(x)
    return op.Mul(above, above)


def _onnx_gelu_tanh(x: Any) -> Any:
    return _fast_gelu(x)


ONNX_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.edgekv.linear.default: _onnx_linear,
    torch.ops.edgekv.rms_norm.default: _onnx_rms_norm,
    torch.ops.edgekv.add_rms_norm.default: _onnx_add_rms_norm,
    torch.ops.edgekv.layer_norm.default: _onnx_layer_norm,
    torch.ops.edgekv.add_layer_norm.default: _onnx_add_layer_norm,
    torch.ops.edgekv.rotary.default: _onnx_rotary,
    torch.ops.edgekv.swiglu.default: _onnx_swiglu,
    torch.ops.edgekv.geglu.default: _onnx_geglu,
    torch.ops.edgekv.relu2.default: _onnx_relu2,
    torch.ops.edgekv.gelu_tanh.default: _onnx_gelu_tanh,
}
