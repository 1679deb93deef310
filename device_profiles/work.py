"""How much one step of a decoder has to move and to compute: bytes and operations, whatever the device.

One step adds ``n_tokens`` tokens to a cache that holds ``context``. Counted is what is really read (LLM-Viewer and GenZ count
likewise): every weight of the layers once per step, the output head only for rows of logits, of a mixture of experts only the
chosen ones, never the input embedding, of which a token reads one row.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekv.spec import PageSpec

from .geometry import Geometry

#: Bits per weight in RAM, scales included. ONNX: blocks of 32 with a float32 scale, int4 with a zero point too; the CPU provider
#: computes fp16 in fp32 and converts it when the session is made. ExecuTorch: int4 in groups of 32 with a bfloat16 scale, int8
#: with one scale per row.
BITS_PER_WEIGHT = {
    "onnx": {"int4": 5.125, "int8": 9.0, "fp16": 32.0, "fp32": 32.0},
    "onnx-cuda": {"int4": 5.125, "int8": 9.0, "fp16": 16.0, "fp32": 32.0},
    "executorch": {"int4": 4.5, "int8": 8.0, "fp16": 16.0, "fp32": 32.0},
}


@dataclass(frozen=True)
class StepWork:
    """What one step asks of a device.

    ``weight_bytes``: weights read, once. ``ops``: 2 per weight and token. ``kv_bytes``: INT8 cache read by attention, and states
    of linear attention, read and written; ``kv_fp16_bytes``: fp16 cache.
    ``attention_ops``: 4 per query head, channel, query and key.
    """

    weight_bytes: float
    ops: float
    kv_bytes: float
    attention_ops: float
    kv_fp16_bytes: float = 0.0


def weights_bytes(model: Geometry, bits_per_weight: float) -> int:
    """Return the bytes of all weights in RAM, the embedding included."""
    return int(model.parameters * bits_per_weight / 8)


def kv_bytes_per_token(pages: PageSpec, *, compressed: bool) -> float:
    """Return the bytes that one token leaves in the cache, all layers: INT8 with its scales, or fp16."""
    page_bytes = pages.warm_bytes if compressed else pages.hot_bytes
    return pages.n_layers * page_bytes / pages.page_size


def kv_tokens(model: Geometry, context: int) -> float:
    """Return how many of ``context`` tokens a step attends to, as a mean over the layers that attend; fewer under windows."""
    return sum(min(context, window) if window else context for window in model.windows) / model.n_kv_layers


def step_work(
    model: Geometry,
    *,
    n_tokens: int,
    context: int,
    bits_per_weight: float,
    kv_bytes_per_token: float,
    fp16_cache: bool = False,
    logits: int = 1,
) -> StepWork:
    """Return the work of one step.

    Args:
        n_tokens: new tokens: 1 in decode, a chunk in prefill.
        context: tokens that the cache holds before the step.
        bits_per_weight: with scales; see :data:`BITS_PER_WEIGHT`.
        kv_bytes_per_token: all layers; see :func:`kv_bytes_per_token`.
        fp16_cache: its pages are fp16, and not INT8.
        logits: rows of logits that are computed; 0 in all chunks of a prompt but the last.
    """
    # A chunk meets ever more of the experts: at most all of them.
    mlp_read = min(model.mlp_weights, n_tokens * model.mlp_active_weights)
    head = model.head_weights if logits else 0
    read = model.mixing_weights + model.n_layers * mlp_read + head
    multiplied = n_tokens * (model.mixing_weights + model.n_layers * model.mlp_active_weights)
    attended = kv_tokens(model, context)
    cached = attended * kv_bytes_per_token
    state_bytes = 2.0 * model.linear.count * model.linear.state_bytes
    # New token i also attends to the i before it and to itself.
    pairs = n_tokens * attended + n_tokens * (n_tokens + 1) / 2
    return StepWork(
        weight_bytes=read * bits_per_weight / 8,
        ops=2.0 * (multiplied + logits * model.head_weights),
        kv_bytes=state_bytes + (0.0 if fp16_cache else cached),
        kv_fp16_bytes=cached if fp16_cache else 0.0,
        attention_ops=4.0 * model.n_kv_layers * model.n_q_heads * model.head_dim * pairs,
    )
