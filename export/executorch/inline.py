"""The inline form as an ExecuTorch program: the whole decoder in one graph, the paged cache as inputs and outputs.

Two methods keep the contract of :func:`edgekv.contract.inline_spec`: ``decode`` for one token and the logits after it,
``prefill`` for 1 to :data:`~edgekv.contract.EXECUTORCH_PREFILL_ROWS` tokens and any of their logits. They share their weights.
ExecuTorch plans memory for the largest shapes, and those are the model's: as many pages and recent tokens as its context has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgekv.contract import EXECUTORCH_PREFILL_ROWS, INLINE_CACHE, GraphSpec, inline_spec
from edgekv.spec import round_up

from ..checkpoint import EMBEDDING, Checkpoint
from ..decoder import build_segment, load_parameter
from ..positions import Positions, distinct_windows
from ..rounding import Compensator
from .lower import lower, quantise_linears
from .rounded import rounded_products
from .seam import Cache, DecodeSeam, PrefillSeam, Seam
from .weights import quantise

Tensor = torch.Tensor
_TORCH = {
    "int64": torch.int64, "int8": torch.int8, "float16": torch.float16, "float32": torch.float32, "bool": torch.bool,
}  # fmt: skip
#: By the first letter of a dimension's name, the second is the layer: sizes to trace with that no dimension of a model has.
_SIZES = {"T": 7, "L": 3, "N": 3, "R": 5}


def write_inline(
    checkpoint: Checkpoint, path: Path, weights: str, page_size: int, compensator: Compensator | None
) -> None:
    """Write the program.

    Args:
        compensator: what int4 products are rounded with; None: each to the nearest code.
    """
    model = checkpoint.config.model
    spec = inline_spec(model, page_size)
    slots = round_up(model.max_context, page_size)
    most = {"T": EXECUTORCH_PREFILL_ROWS, "L": EXECUTORCH_PREFILL_ROWS, "N": slots // page_size, "R": slots}
    segments = _load_segments(checkpoint, weights, compensator)
    embedding = _Embedding(checkpoint.tensor(EMBEDDING), weights)
    ways: dict[str, tuple[type[Seam], dict[str, int]]] = {
        "decode": (DecodeSeam, {"T": 1, "L": 1}),
        "prefill": (PrefillSeam, {}),
    }
    methods = {}
    for name, (seam, fixed) in ways.items():
        example, dynamic = _examples(spec, fixed, most)
        decoder = InlineDecoder(checkpoint, embedding, segments, seam).eval()
        methods[name] = (decoder, example, (dynamic,))
    program = lower(methods, whole=False)
    with path.open("wb") as stream:
        program.write_to_file(stream)


def _examples(
    spec: GraphSpec, fixed: dict[str, int], most: dict[str, int]
) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Return inputs to trace with, and which of their dimensions vary.

    Args:
        fixed: dimensions that do not, with their sizes.
        most: the largest size of the others, by the first letter of their names.
    """
    sizes, dims = {**_SIZES, **fixed}, dict[str, Any]()
    example, dynamic = [], []
    for tensor in spec.inputs:
        free = {axis: dim for axis, dim in enumerate(tensor.shape) if isinstance(dim, str) and dim not in fixed}
        for dim in free.values():
            dims.setdefault(dim, torch.export.Dim(dim, min=0, max=most[dim[0]]))
        shape = [sizes[dim[0]] if isinstance(dim, str) else dim for dim in tensor.shape]
        example.append(torch.zeros(shape, dtype=_TORCH[tensor.dtype]))
        dynamic.append({axis: dims[dim] for axis, dim in free.items()})
    return tuple(example), tuple(dynamic)


def _load_segments(checkpoint: Checkpoint, weights: str, compensator: Compensator | None) -> nn.ModuleList:
    segments = nn.ModuleList()
    for index in range(checkpoint.config.model.n_layers + 1):
        segment = build_segment(checkpoint.config, index).to_empty(device="cpu").requires_grad_(False)
        for name, parameter in segment.named_parameters():
            parameter.data.copy_(load_parameter(checkpoint, index, name))
        rounded = rounded_products(checkpoint, index, segment, compensator)
        quantise_linears(segment, f"segment_{index}", weights, known=rounded)
        segments.append(segment)
    return segments


class InlineDecoder(nn.Module):
    """Inputs and outputs of :func:`edgekv.contract.inline_spec`, in order."""

    def __init__(self, checkpoint: Checkpoint, embedding: nn.Module, segments: nn.ModuleList, seam: type[Seam]) -> None:
        super().__init__()
        model = checkpoint.config.model
        self.n_layers, self.windows = model.n_layers, model.windows
        self.order = distinct_windows(model)
        self.ropes = [model.rope_of(layer) for layer in range(model.n_layers)]
        self.positions = Positions(model)
        self.seams = nn.ModuleList(seam(model, window) for window in self.order)
        self.embedding, self.segments = embedding, segments

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run a step."""
        input_ids, position_ids, logits_rows, *cached = inputs
        turned, masks = self.positions.turned(position_ids), self.positions.masks(position_ids)
        residual = self.embedding(input_ids)
        outputs: list[Tensor] = []
        q, k, v = self.segments[0](residual, *turned[self.ropes[0]])
        width = len(INLINE_CACHE)
        for layer in range(self.n_layers):
            kind = self.order.index(self.windows[layer])
            cache = Cache(*cached[layer * width : (layer + 1) * width])
            attention, mass = self.seams[kind](q, k, v, cache, position_ids, masks[kind])
            outputs += [k, v, mass]
            if layer + 1 < self.n_layers:
                own = turned[self.ropes[layer + 1]]
                residual, q, k, v = self.segments[layer + 1](residual, attention, *own)
        # Of the last layer only what the wanted logits need.
        wanted = (torch.index_select(values, 0, logits_rows) for values in (residual, attention))
        return (self.segments[self.n_layers](*wanted), *outputs)


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
