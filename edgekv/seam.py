"""The attention seam: the one definition of what paged attention means.

Small, slow and obvious. The native kernels, the graphs that `export` lowers and the NumPy path of the runtime
are all checked against :func:`paged_attention`. Everything is computed in float32.

Queries of the new tokens attend to every unmasked slot of every page and, causally, to the new tokens
themselves. Keys are stored after RoPE, so the order of pages does not matter to the meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


@dataclass(frozen=True)
class PageView:
    """One page as plain arrays.

    keys, values: [n_kv_heads, page_size, head_dim] float32, decoded; mask: [page_size] bool, True where the slot
    holds a live token; positions: [page_size] int64, the position of each slot's token (only read where a window
    applies).
    """

    keys: Float
    values: Float
    mask: NDArray[np.bool_]
    positions: NDArray[np.int64]


def paged_attention(
    q: Float,
    new_k: Float,
    new_v: Float,
    pages: list[PageView],
    positions: NDArray[np.int64],
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Float | None = None,
) -> tuple[Float, Float]:
    """Attend new tokens to pages and to themselves.

    Args:
        q: [T, n_q_heads, head_dim] queries after RoPE.
        new_k: [T, n_kv_heads, head_dim] keys after RoPE of the same tokens.
        new_v: [T, n_kv_heads, head_dim] values of the same tokens.
        pages: earlier tokens.
        positions: [T] positions of the new tokens, increasing.
        scale: multiplies the scores, usually head_dim ** -0.5.
        window: a query at position i sees positions j with i - j < window; 0 means all.
        softcap: scores become softcap * tanh(score / softcap); 0 means none. Source: Gemma 2, arXiv 2408.00118.
        sinks: [n_q_heads] learned logits that join the softmax without a value, or None.

    Returns:
        out [T, n_q_heads, head_dim] and page_mass [n_pages]: the softmax mass that each page received,
        averaged over heads and new tokens. A query that sees no token at all yields zeros.
    """
    n_new, n_q_heads, head_dim = q.shape
    n_kv_heads = new_k.shape[1]
    group = n_q_heads // n_kv_heads
    keys = np.concatenate([p.keys for p in pages] + [new_k.transpose(1, 0, 2)], axis=1)
    values = np.concatenate([p.values for p in pages] + [new_v.transpose(1, 0, 2)], axis=1)
    key_positions = np.concatenate([p.positions for p in pages] + [positions])
    live = np.concatenate([p.mask for p in pages] + [np.ones(n_new, bool)])
    visible = np.broadcast_to(live, (n_new, live.size)).copy()
    visible[:, live.size - n_new :] = np.tril(np.ones((n_new, n_new), bool))
    if window:
        visible &= positions[:, None] - key_positions[None, :] < window

    out = np.zeros((n_new, n_q_heads, head_dim), np.float32)
    mass = np.zeros(len(pages), np.float32)
    for head in range(n_q_heads):
        k, v = keys[head // group], values[head // group]
        # A masked slot may hold anything, even NaN: it must not reach a product.
        k, v = np.where(live[:, None], k, 0), np.where(live[:, None], v, 0)
        scores = (q[:, head] @ k.T) * np.float32(scale)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        scores = np.where(visible, scores, -np.inf)
        peak = scores.max(axis=1, keepdims=True)
        if sinks is not None:
            peak = np.maximum(peak, sinks[head])
        peak = np.where(np.isfinite(peak), peak, 0)
        weights = np.exp(scores - peak)
        total = weights.sum(axis=1, keepdims=True)
        if sinks is not None:
            total = total + np.exp(sinks[head] - peak)
        weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        out[:, head] = weights @ v
        start = 0
        for index, page in enumerate(pages):
            stop = start + page.mask.size
            mass[index] += weights[:, start:stop].sum() / (n_new * n_q_heads)
            start = stop
    return out, mass
