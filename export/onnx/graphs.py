"""A checkpoint written as ONNX graphs, in the split or the inline form.

Both forms are put together from the same pieces: the split form saves each segment as a graph of its own, the inline
form joins them with the seam in stock operations. Neither reads more than one tensor into memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgekv.bundle import EmbeddingSpec
from edgekv.contract import inline_spec, segment_spec

from ..checkpoint import Checkpoint
from ..decoder import segment_kind
from ..weights import WeightFile
from .graph_builder import GraphBuilder, WeightBinder, segment_sources
from .pieces import Piece, export_attention, export_positions, export_segments

WEIGHT_FILE = "weights.bin"
_EMBEDDING_DTYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8", "int4": "int4"}

Step = Callable[[str], None]


def write_graphs(
    checkpoint: Checkpoint, folder: Path, *, form: str, weights: str, page_size: int, step: Step
) -> tuple[tuple[str, ...], EmbeddingSpec | None]:
    """Write the graphs and their weights into ``folder``.

    Args:
        step: called with the name of each step before it starts; there are :func:`count_steps` of them.

    Returns:
        the names of the graph files in order, and where the runtime finds the embedding (split form only).
    """
    step("tracing the decoder")
    segments = export_segments(checkpoint.config)
    with WeightFile(folder / WEIGHT_FILE) as file:
        binder = WeightBinder(checkpoint, file, weights)
        if form == "inline":
            return _write_inline(binder, segments, folder, page_size, step), None
        return _write_split(binder, segments, folder, step)


def count_steps(checkpoint: Checkpoint) -> int:
    """Return how often :func:`write_graphs` calls ``step``."""
    return checkpoint.config.model.n_layers + 3


def _write_split(
    binder: WeightBinder, segments: dict[str, Piece], folder: Path, step: Step
) -> tuple[tuple[str, ...], EmbeddingSpec]:
    config = binder.checkpoint.config
    names = []
    for index in range(config.model.n_layers + 1):
        step(f"segment {index} of {config.model.n_layers}")
        piece = segments[segment_kind(config, index)]
        builder = GraphBuilder(binder)
        builder.add(piece, f"/model/segment_{index}", {}, segment_sources(binder.checkpoint, index, piece))
        spec = segment_spec(config.model, index)
        names.append(f"{spec.name}.onnx")
        builder.save(spec, folder / names[-1])
    step("embedding")
    table = binder.embedding()
    scales = table.scales.offset if table.scales else 0
    return tuple(names), EmbeddingSpec(WEIGHT_FILE, _EMBEDDING_DTYPES[table.kind], table.data.offset, scales)


def _write_inline(
    binder: WeightBinder, segments: dict[str, Piece], folder: Path, page_size: int, step: Step
) -> tuple[str, ...]:
    config = binder.checkpoint.config
    model = config.model
    builder = GraphBuilder(binder)
    seam = export_attention(model.n_q_heads, model.n_kv_heads, model.head_dim, model.softmax_scale, page_size)
    step("embedding")
    builder.embed("input_ids", "hidden.0")
    builder.add(export_positions(model), "/model/positions", {})
    for index in range(model.n_layers + 1):
        step(f"layer {index} of {model.n_layers}")
        before, after = f"hidden.{index - 1}" if index else "hidden.0", f"hidden.{index}"
        names = {
            "residual": before if index else "hidden.0",
            "next_residual": after,
            "attention": f"attention.{index - 1}",
            "q": f"queries.{index}",
            "k": f"new_keys.{index}",
            "v": f"new_values.{index}",
        }
        piece = segments[segment_kind(config, index)]
        builder.add(piece, f"/model/segment_{index}", names, segment_sources(binder.checkpoint, index, piece))
        if index < model.n_layers:
            builder.add(seam, f"/model/layers.{index}/attention", {**names, **_seam_names(model.windows[index], index)})
    spec = inline_spec(model, page_size)
    builder.save(spec, folder / "model.onnx")
    return ("model.onnx",)


def _seam_names(window: int, layer: int) -> dict[str, str]:
    cached = ("key_pages", "key_scales", "value_pages", "value_scales", "recent_keys", "recent_values", "slot_mask")
    return {
        **{name: f"{name}.{layer}" for name in (*cached, "page_mass", "attention")},
        "causal": f"causal_{window}",
    }
