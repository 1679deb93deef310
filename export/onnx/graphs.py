"""A checkpoint written as ONNX graphs, in the split or the inline form.

Both forms are put together from the same pieces: the split form saves each segment as a graph of its own, the inline
form joins them with the seam in stock operations. Neither reads more than one tensor into memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from onnx import helper

from edgekv.bundle import EmbeddingSpec, MatrixFacts
from edgekv.contract import INLINE_CACHE, inline_spec, segment_spec

from ..checkpoint import Checkpoint
from ..decoder import segment_kind
from ..matrix_kinds import MatrixKinds
from ..positions import distinct_windows
from ..rounding import Calibration, Compensator
from ..weights import WeightFile
from ..written import Written
from .graph_builder import GraphBuilder, WeightBinder, segment_sources
from .nodes import Nodes
from .pieces import Piece, export_positions, export_segments
from .seam import Geometry, build_seam

WEIGHT_FILE = "weights.bin"
_EMBEDDING_DTYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}

Step = Callable[[str], None]


def write_graphs(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    form: str,
    kinds: MatrixKinds,
    page_size: int,
    io: str,
    calibration: Calibration | None,
    step: Step,
) -> Written:
    """Write the graphs and their weights into ``folder``.

    Args:
        calibration: what int4 weights are rounded with; None: each to the nearest code.
        step: called with the name of each step before it starts; there are :func:`count_steps` of them.
    """
    step("tracing the decoder")
    segments = export_segments(checkpoint.config)
    with WeightFile(folder / WEIGHT_FILE) as file:
        compensator = None
        if calibration is not None:
            compensator = Compensator(checkpoint, calibration, rounds=lambda name: kinds.of(name) == "int4")
        binder = WeightBinder(checkpoint, file, kinds, compensator)
        if form == "inline":
            return _write_inline(binder, segments, folder, page_size, io, step)
        return _write_split(binder, segments, folder, step)


def count_steps(checkpoint: Checkpoint) -> int:
    """Return how often :func:`write_graphs` calls ``step``."""
    return checkpoint.config.model.n_layers + 3


def _write_split(binder: WeightBinder, segments: dict[str, Piece], folder: Path, step: Step) -> Written:
    config = binder.checkpoint.config
    matrices: dict[str, dict[str, MatrixFacts]] = {}
    for index in range(config.model.n_layers + 1):
        step(f"segment {index} of {config.model.n_layers}")
        piece = segments[segment_kind(config, index)]
        builder = GraphBuilder(binder)
        builder.add(piece, f"/model/segment_{index}", {}, segment_sources(binder.checkpoint, index, piece))
        spec = segment_spec(config.model, index)
        matrices[f"{spec.name}.onnx"] = builder.matrices
        builder.save(spec, folder / f"{spec.name}.onnx")
    step("embedding")
    head = binder.matrix((binder.checkpoint.head,))
    table = binder.embedding()
    scales = table.scales.offset if table.scales else 0
    apart = table.data != head.data if config.model.tied_embeddings else None
    embedding = EmbeddingSpec(WEIGHT_FILE, _EMBEDDING_DTYPES[table.kind], table.data.offset, scales, apart)
    return Written(tuple(matrices), embedding, matrices)


def _write_inline(
    binder: WeightBinder, segments: dict[str, Piece], folder: Path, page_size: int, io: str, step: Step
) -> Written:
    config = binder.checkpoint.config
    model = config.model
    builder = GraphBuilder(binder)
    seams = {window: build_seam(Geometry.of(model, page_size, window)) for window in distinct_windows(model)}
    step("embedding")
    builder.embed("input_ids", "hidden.0")
    builder.add(export_positions(model), "/model/positions", {})
    builder.add(_once(), "/model/once", {})
    for index in range(model.n_layers + 1):
        step(f"layer {index} of {model.n_layers}")
        names = {
            "residual": f"hidden.{max(index - 1, 0)}",
            "next_residual": f"hidden.{index}",
            "attention": f"attention.{index - 1}",
            "q": f"queries.{index}",
            "k": f"new_keys.{index}",
            "v": f"new_values.{index}",
        }
        if index < model.n_layers:
            names |= {name: f"{name}_{model.rope_of(index)}" for name in ("cos", "sin")}
        if index == model.n_layers:  # of the last layer only what the wanted logits need
            for name in ("residual", "attention"):
                builder.gather(names[name], "logits_rows", f"{name}_rows", "/model/logits_rows")
                names[name] = f"{name}_rows"
        piece = segments[segment_kind(config, index)]
        builder.add(piece, f"/model/segment_{index}", names, segment_sources(binder.checkpoint, index, piece))
        if index < model.n_layers:
            window = model.windows[index]
            builder.add(seams[window], f"/model/layers.{index}/attention", {**names, **_seam_names(window, index)})
    spec = inline_spec(model, page_size, io=io)
    builder.save(spec, folder / "model.onnx")
    return Written(("model.onnx",), matrices={"model.onnx": builder.matrices})


def _once() -> Piece:
    """Whether a step is of one token."""
    g = Nodes()
    node = helper.make_node("Equal", [g("Size", "input_ids"), g.constant(np.int64(1))], ["alone"])
    return Piece(("input_ids",), ("alone",), (), tuple(g.constants.values()), (*g.nodes, node))


def _seam_names(window: int, layer: int) -> dict[str, str]:
    named = {name: f"{name}.{layer}" for name in (*INLINE_CACHE, "page_mass", "attention")}
    return {**named, "causal": f"causal_{window}", "position_ids": "position_ids", "alone": "alone"}
