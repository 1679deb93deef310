"""The I/O contract: the name, dtype and shape of every tensor that an exported graph takes and gives.

All that `export` and `runtime` share is here and in :mod:`edgekv.bundle`. Shapes mix numbers and
symbols: ``T`` new tokens in this step, ``N0`` pages of layer 0, ``R0`` its recent tokens kept in fp16. Version 2.

``inline``: one graph with the paged cache as explicit inputs and outputs.
``split``: the dense parts between the attention seams; segment ``l`` ends where layer ``l`` attends.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekv.spec import ModelSpec

CONTRACT_VERSION = 2
FORMS = ("split", "inline")
ENGINES = ("onnx", "executorch")
WEIGHTS = ("int4", "int8", "fp16", "fp32")
#: Asks for the matrices of a quantised checkpoint as they are, in its own codes.
STORED = "stored"
#: What became of the codes of a quantised checkpoint: the bundle has them, or they were rounded anew.
SOURCE_CODES = ("kept", "rounded")
#: ``mixed:N`` asks for int4, and for int8 where it was measured to be worth most, within N bits a weight. The bundle's are int4.
MIXED = "mixed"
#: What computes the dense part of an ExecuTorch program: XNNPACK's delegate, or operators on our native kernels.
OPERATORS = ("xnnpack", "edgekv")
#: From this many parameters on, weights are int4 when nothing is asked for, below fp32.
INT4_FROM_PARAMETERS = 100_000_000
PAGE_SIZE = 32
#: The types of scales and recent tokens in the inline form: float16, or float32 for bindings that know no float16 (Swift's).
IO = ("compact", "portable")
#: The oldest ONNX Runtime that runs a bundle, by how its weights are stored; tools/old_engines.py tries them.
LEAST_ONNXRUNTIME = {"int4": "1.18", "int8": "1.22", "fp16": "1.18", "fp32": "1.18"}

#: Numbers of rows for which an ExecuTorch program has methods: its shapes are fixed, and a step is put together of them.
EXECUTORCH_ROWS = (1, 16, 128)
EXECUTORCH_HEAD_ROWS = (1, 16)
#: Inline form: the most new tokens of a step.
EXECUTORCH_PREFILL_ROWS = 64

Dim = int | str


def default_weights(parameters: int) -> str:
    """Return the weight kind for a model of this size when none is asked for."""
    return "int4" if parameters >= INT4_FROM_PARAMETERS else "fp32"


@dataclass(frozen=True)
class TensorSpec:
    """One documented input or output."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    meaning: str


@dataclass(frozen=True)
class GraphSpec:
    """One graph: its inputs and outputs, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def segment_spec(model: ModelSpec, index: int) -> GraphSpec:
    """Return the contract of segment ``index`` (0 .. n_layers) of the split form.

    Segment ``l`` holds the output projection and MLP of layer ``l - 1`` and the norm, QKV projection
    and RoPE of layer ``l``. The last one ends in the logits.
    """
    hidden, heads, kv_heads, dim = model.hidden_size, model.n_q_heads, model.n_kv_heads, model.head_dim
    which = 0 if index == model.n_layers else model.rope_of(index)
    half = model.ropes[which].rotary_dim // 2
    table = "rope" if model.sliding_rope is None else "the layer's rope"
    residual = TensorSpec("residual", "float32", ("T", hidden), "the residual stream that enters this segment")
    attention = TensorSpec("attention", "float32", ("T", heads, dim), f"what the seam of layer {index - 1} returned")
    rope = (
        TensorSpec("cos", "float32", ("T", half), f"cosine of position times {table}.inv_freq, scaled"),
        TensorSpec("sin", "float32", ("T", half), f"sine of position times {table}.inv_freq, scaled"),
    )
    next_residual = TensorSpec(
        "next_residual", "float32", ("T", hidden), "the residual stream that leaves this segment"
    )
    qkv = (
        TensorSpec("q", "float32", ("T", heads, dim), f"queries of layer {index}, after RoPE"),
        TensorSpec("k", "float32", ("T", kv_heads, dim), f"keys of layer {index}, after RoPE"),
        TensorSpec("v", "float32", ("T", kv_heads, dim), f"values of layer {index}"),
    )
    name = f"segment_{index}"
    if index == 0:
        embedded = TensorSpec("residual", "float32", ("T", hidden), "rows of the embedding for the new tokens")
        return GraphSpec(name, (embedded, *rope), qkv)
    if index < model.n_layers:
        return GraphSpec(name, (residual, attention, *rope), (next_residual, *qkv))
    logits = TensorSpec(
        "logits", "float32", ("T", model.vocab_size), "scores of the next token, one row per token given"
    )
    return GraphSpec(name, (residual, attention), (logits,))


#: The inputs of the inline form that hold the cache of one layer, in order, each followed by the layer's number.
INLINE_CACHE = (
    "key_pages", "key_scales", "value_pages", "value_scales", "page_positions",
    "recent_keys", "recent_values", "recent_positions",
)  # fmt: skip


def inline_spec(model: ModelSpec, page_size: int, version: int = CONTRACT_VERSION, io: str = IO[0]) -> GraphSpec:
    """Return the contract of the inline form: the paged cache itself as inputs and outputs.

    Args:
        version: of the contract, as a bundle's manifest says.
        io: one of :data:`IO`; a bundle of version 1 is compact.
    """
    if version == 1:
        return _inline_spec_1(model, page_size)
    half = "float32" if io == "portable" else "float16"
    kv_heads, dim = model.n_kv_heads, model.head_dim
    inputs = [
        TensorSpec("input_ids", "int64", ("T",), "the new tokens"),
        TensorSpec("position_ids", "int64", ("T",), "their positions, increasing"),
        TensorSpec(
            "logits_rows", "int64", ("L",), "the new tokens, by number from 0, whose logits are wanted; or none"
        ),
    ]
    outputs = [
        TensorSpec(
            "logits", "float32", ("L", model.vocab_size), "scores of the token that follows each of `logits_rows`"
        )
    ]
    for layer in range(model.n_layers):
        n, r = f"N{layer}", f"R{layer}"  # equal names would promise an engine equal sizes in all layers
        meanings = (
            ("int8", (n, kv_heads, dim, page_size), "codes of the keys, after RoPE: channel by channel"),
            (half, (n, kv_heads, dim), "key scale per channel within a page"),
            ("int8", (n, kv_heads, page_size, dim), "codes of the values: token by token"),
            (half, (n, kv_heads, page_size), "value scale per token"),
            (
                "int64",
                (n, page_size),
                "position of the token in each slot of a page; -1: no token, nobody sees the slot",
            ),
            (half, (r, kv_heads, dim), "keys not yet quantised"),
            (half, (r, kv_heads, dim), "values not yet quantised"),
            ("int64", (r,), "position of each of these tokens; -1: no token, nobody sees it"),
        )
        inputs += [TensorSpec(f"{name}.{layer}", *row) for name, row in zip(INLINE_CACHE, meanings, strict=True)]
        outputs += [
            TensorSpec(f"new_keys.{layer}", "float32", ("T", kv_heads, dim), "keys of the new tokens, after RoPE"),
            TensorSpec(f"new_values.{layer}", "float32", ("T", kv_heads, dim), "values of the new tokens"),
            TensorSpec(f"page_mass.{layer}", "float32", (n,), "softmax mass per page, mean over heads and new tokens"),
        ]
    return GraphSpec("model", tuple(inputs), tuple(outputs))


def _inline_spec_1(model: ModelSpec, page_size: int) -> GraphSpec:
    """Return the contract of the inline form in bundles of before."""
    kv_heads, dim = model.n_kv_heads, model.head_dim
    inputs = [
        TensorSpec("input_ids", "int64", ("T",), "the new tokens"),
        TensorSpec("position_ids", "int64", ("T",), "their positions, increasing"),
    ]
    outputs = [
        TensorSpec("logits", "float32", ("T", model.vocab_size), "scores of the next token after each new token")
    ]
    for layer in range(model.n_layers):
        n, r = f"N{layer}", f"R{layer}"  # equal names would promise an engine equal sizes in all layers
        inputs += [
            TensorSpec(f"key_pages.{layer}", "int8", (n, kv_heads, page_size, dim), "codes of the keys, after RoPE"),
            TensorSpec(f"key_scales.{layer}", "float16", (n, kv_heads, dim), "key scale per channel within a page"),
            TensorSpec(f"value_pages.{layer}", "int8", (n, kv_heads, page_size, dim), "codes of the values"),
            TensorSpec(f"value_scales.{layer}", "float16", (n, kv_heads, page_size), "value scale per token"),
            TensorSpec(f"recent_keys.{layer}", "float16", (r, kv_heads, dim), "keys not yet quantised"),
            TensorSpec(f"recent_values.{layer}", "float16", (r, kv_heads, dim), "values not yet quantised"),
            TensorSpec(
                f"slot_mask.{layer}",
                "bool",
                ("T", f"S{layer}"),
                f"S{layer} = {n} * {page_size} + {r}: the slots that each new token may attend to (pages first, then recent)",
            ),
        ]
        outputs += [
            TensorSpec(f"new_keys.{layer}", "float32", ("T", kv_heads, dim), "keys of the new tokens, after RoPE"),
            TensorSpec(f"new_values.{layer}", "float32", ("T", kv_heads, dim), "values of the new tokens"),
            TensorSpec(f"page_mass.{layer}", "float32", (n,), "softmax mass per page, mean over heads and new tokens"),
        ]
    return GraphSpec("model", tuple(inputs), tuple(outputs))


def executorch_method(name: str, rows: int) -> str:
    """Return the name of the method of an ExecuTorch program that runs a graph on ``rows`` tokens."""
    return f"{name}_t{rows}"
