"""The inline form as an ExecuTorch program: the whole decoder in one graph, the paged cache as inputs and outputs.

Two methods keep the contract of :func:`edgekv.contract.inline_spec`: ``decode`` for exactly one token, ``prefill`` for
2 to :data:`~edgekv.contract.EXECUTORCH_PREFILL_ROWS`. They share their weights. ExecuTorch plans memory for the
largest shapes, so the number of cached tokens has a limit, which stands in the program.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgekv.contract import EXECUTORCH_CACHED_TOKENS, EXECUTORCH_PREFILL_ROWS, inline_spec

from ..attention import InlineAttention, Positions, distinct_windows
from ..checkpoint import EMBEDDING, Checkpoint
from ..decoder import build_segment, load_parameter
from .lower import lower, quantise_linears
from .weights import quantise

Tensor = torch.Tensor
_TORCH = {
    "int64": torch.int64, "int8": torch.int8, "float16": torch.float16, "float32": torch.float32, "bool": torch.bool,
}  # fmt: skip


def write_inline(checkpoint: Checkpoint, path: Path, weights: str, page_size: int) -> None:
    """Write the program."""
    spec = inline_spec(checkpoint.config.model, page_size, version=1)
    decoder = InlineDecoder(checkpoint, weights).eval()
    pages = EXECUTORCH_CACHED_TOKENS // page_size
    methods = {}
    for name, rows in (("decode", 1), ("prefill", 7)):
        # By the first letter of a dimension's name; the second is the layer.
        sizes = {"T": rows, "N": 3, "R": 5, "S": 3 * page_size + 5}
        dims: dict[str, Any] = {
            "N": torch.export.Dim("N", min=2, max=pages),
            "R": torch.export.Dim("R", min=2, max=EXECUTORCH_CACHED_TOKENS),
            "S": torch.export.Dim.DYNAMIC(max=2 * EXECUTORCH_CACHED_TOKENS),
        }
        if rows > 1:
            dims["T"] = torch.export.Dim("T", min=2, max=EXECUTORCH_PREFILL_ROWS)
        example = tuple(
            torch.zeros(
                [sizes[dim[0]] if isinstance(dim, str) else dim for dim in tensor.shape], dtype=_TORCH[tensor.dtype]
            )
            for tensor in spec.inputs
        )
        dynamic = tuple(
            {axis: dims[dim[0]] for axis, dim in enumerate(tensor.shape) if isinstance(dim, str) and dim[0] in dims}
            for tensor in spec.inputs
        )
        methods[name] = (decoder, example, (dynamic,))
    program = lower(methods, whole=False)
    with path.open("wb") as stream:
        program.write_to_file(stream)


class InlineDecoder(nn.Module):
    """Inputs and outputs of :func:`edgekv.contract.inline_spec`, in order."""

    def __init__(self, checkpoint: Checkpoint, weights: str) -> None:
        super().__init__()
        config = checkpoint.config
        model = config.model
        self.n_layers = model.n_layers
        self.windows = model.windows
        self.order = distinct_windows(model)
        self.embedding = _Embedding(checkpoint.tensor(EMBEDDING), weights)
        self.positions = Positions(model.rope, self.order)
        self.seam = _Seam(model.n_q_heads, model.n_kv_heads, model.head_dim, model.softmax_scale)
        segments = []
        for index in range(model.n_layers + 1):
            segment = build_segment(config, index).to_empty(device="cpu").requires_grad_(False)
            for name, parameter in segment.named_parameters():
                parameter.data.copy_(load_parameter(checkpoint, index, name))
            quantise_linears(segment, f"segment_{index}", weights)
            segments.append(segment)
        self.segments = nn.ModuleList(segments)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run a step."""
        input_ids, position_ids = inputs[:2]
        cos, sin, *masks = self.positions(position_ids)
        residual = self.embedding(input_ids)
        outputs: list[Tensor] = []
        q, k, v = self.segments[0](residual, cos, sin)
        for layer in range(self.n_layers):
            cached = inputs[2 + 7 * layer : 9 + 7 * layer]
            attention, mass = self.seam(q, k, v, *cached, masks[self.order.index(self.windows[layer])])
            outputs += [k, v, mass]
            if layer + 1 < self.n_layers:
                residual, q, k, v = self.segments[layer + 1](residual, attention, cos, sin)
        return (self.segments[self.n_layers](residual, attention), *outputs)


class _Embedding(nn.Module):
    def __init__(self, table: Tensor, weights: str) -> None:
        super().__init__()
        self.quantised = weights != "fp32"
        if self.quantised:
            rows = quantise(table, "int8")
            self.register_buffer("codes", rows.codes)
            self.register_buffer("scales", rows.scales)
        else:
            self.register_buffer("table", table)

    def forward(self, ids: Tensor) -> Tensor:
        if not self.quantised:
            return torch.index_select(self.table, 0, ids)  # type: ignore[arg-type]
        codes = torch.index_select(self.codes, 0, ids)  # type: ignore[arg-type]
        return codes.to(torch.float32) * torch.index_select(self.scales, 0, ids)  # type: ignore[arg-type]


class _Seam(InlineAttention):
    """The seam with its INT8 codes taken up by the delegate: a plain cast would run outside of it, 30 times slower."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, key_pages, key_scales, value_pages, *rest = inputs
        return super().forward(q, k, v, _dequantise(key_pages), key_scales, _dequantise(value_pages), *rest)


def _dequantise(codes: Tensor) -> Tensor:
    import torch.ao.quantization.fx._decomposed  # defines the operator

    result: Tensor = torch.ops.quantized_decomposed.dequantize_per_tensor.default(codes, 1.0, 0, -128, 127, torch.int8)
    return result
