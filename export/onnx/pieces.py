"""From a torch module to a piece of an ONNX graph, through torch.onnx's dynamo exporter.

A piece is structure only: its weights are open inputs, so one export serves every layer of the same structure and
costs no memory, whatever the size of the model. Pieces are remembered: a second export of the same structure (the
other form, other weights) does not trace again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_ir
import torch
from onnxscript import optimizer
from torch import nn

from edgekv.logs import quiet
from edgekv.spec import ModelSpec, RopeSpec

from ..config import DecoderConfig
from ..decoder import build_segment, segment_kind
from ..ops import ONNX_TRANSLATIONS
from ..positions import Positions

#: Opset 21 is the newest whose every operator runs in ONNX Runtime 1.20 and later, on desktop and mobile builds.
OPSET = 21
Tensor = torch.Tensor
Dynamic = Mapping[int, str]


@dataclass(frozen=True)
class Piece:
    """Nodes in order, the values they read from outside, those they give, their weights and constants."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    constants: tuple[onnx.TensorProto, ...]
    nodes: tuple[onnx.NodeProto, ...]


def export_segments(config: DecoderConfig) -> dict[str, Piece]:
    """Export each distinct segment structure of the decoder once, by its kind."""
    kinds = {segment_kind(config, index): index for index in reversed(range(config.model.n_layers + 1))}
    pieces = {}
    for kind, index in kinds.items():
        rotated = index == config.model.n_layers or config.rotated[index]
        place = 0 if index == 0 else 2 if index == config.model.n_layers else 1
        pieces[kind] = _export_segment(_structure(config, rotated=rotated, head=place == 2), place)
    return pieces


def _structure(config: DecoderConfig, *, rotated: bool, head: bool) -> DecoderConfig:
    """Keep what a segment's structure depends on, as a decoder of two layers: equal structures share their pieces.

    Args:
        head: the segment that ends in the logits, of which alone the vocabulary is a part.
    """
    model = dataclasses.replace(
        config.model,
        architecture="",
        n_layers=2,
        vocab_size=config.model.vocab_size if head else 1,
        rope=RopeSpec((0.0,) * len(config.model.rope.inv_freq)),
        sliding_rope=None,
        windows=(),
        max_context=0,
        tied_embeddings=False,
        bos_token_id=None,
        eos_token_ids=(),
    )
    return dataclasses.replace(
        config, model=model, rotated=(rotated, rotated), interleaved_rope=False, renamed=(), fused=()
    )


@functools.lru_cache(maxsize=32)
def _export_segment(config: DecoderConfig, index: int) -> Piece:
    model = config.model
    half = model.rope.rotary_dim // 2
    rope = [_example(_T, half), _example(_T, half)]
    residual, attention = _example(_T, model.hidden_size), _example(_T, model.n_q_heads, model.head_dim)
    if index == 0:
        example, names = [residual, *rope], ["q", "k", "v"]
    elif index < model.n_layers:
        example, names = [residual, attention, *rope], ["next_residual", "q", "k", "v"]
    else:
        example, names = [residual, attention], ["logits"]
    return _export(build_segment(config, index), example, [{0: "T"}] * len(example), names)


def export_positions(model: ModelSpec) -> Piece:
    """Export what the inline form derives from position_ids: cosines, sines and causal masks."""
    module = Positions(model)
    turned = [f"{name}_{number}" for number in range(len(model.ropes)) for name in ("cos", "sin")]
    names = [*turned, *(f"causal_{window}" for window in module.windows)]
    return _export(module, [torch.zeros(_T, dtype=torch.int64)], [{0: "T"}], names)


_T = 7  # any number of new tokens that no dimension of a model has


def _example(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def _export(module: nn.Module, example: list[Tensor], dynamic: list[Dynamic], names: list[str]) -> Piece:
    dims: dict[str, object] = {}

    def dim(name: str) -> object:
        return dims.setdefault(name, torch.export.Dim(name, min=1, max=1 << 20))

    shapes = tuple({axis: dim(name) for axis, name in axes.items()} for axes in dynamic)
    with quiet(), torch.no_grad():
        program = torch.export.export(module.eval(), tuple(example), dynamic_shapes=shapes)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=dict(ONNX_TRANSLATIONS),
            output_names=names,
            optimize=False,  # it would read the weights, and there are none
            verbose=False,
        )
    assert exported is not None
    model = exported.model
    parameters = [name for name, _ in module.named_parameters()]
    inputs = [str(value.name) for value in model.graph.inputs]
    for name in parameters:
        value = model.graph.initializers.pop(name)
        value.const_value = None  # a meta tensor: nothing to read
        model.graph.inputs.append(value)
    optimizer.optimize_ir(model)
    graph = onnx_ir.to_proto(model).graph
    return Piece(
        inputs=tuple(inputs),
        outputs=tuple(value.name for value in graph.output),
        parameters=tuple(parameters),
        constants=tuple(graph.initializer),
        nodes=tuple(graph.node),
    )
