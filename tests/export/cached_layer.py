"""A layer's cache as the contract lays it out: pages in any order, tokens in them that are gone, and NaN wherever no token is."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from edgekv.contract import INLINE_CACHE
from edgekv.seam import PageView


class Shape(NamedTuple):
    """What the layers of a model have in common."""

    n_kv_heads: int
    head_dim: int
    page_size: int


def make_layer(
    rng: np.random.Generator, shape: Shape, n_pages: int, n_recent: int, live: float, past: int
) -> tuple[dict[str, Any], list[PageView]]:
    """Make the inputs of a layer and what they mean: a view of each page, and one of the recent tokens as the last.

    Args:
        live: share of slots that hold a token.
        past: the positions are below it.
    """
    kv, dim, page = shape
    slots = n_pages * page + n_recent
    tokens = np.sort(rng.choice(past, slots, replace=False)) if slots else np.empty(0, np.int64)
    held = np.where(rng.random(slots) < live, tokens, -1)
    page_positions = held[: n_pages * page].reshape(-1, page)[rng.permutation(n_pages)]
    recent_positions = held[n_pages * page :][rng.permutation(n_recent)]
    key_codes = rng.integers(-127, 128, (n_pages, kv, dim, page)).astype(np.int8)
    value_codes = rng.integers(-127, 128, (n_pages, kv, page, dim)).astype(np.int8)
    key_scales = rng.uniform(0, 0.02, (n_pages, kv, dim)).astype(np.float16)
    value_scales = rng.uniform(0, 0.02, (n_pages, kv, page)).astype(np.float16)
    recent = rng.standard_normal((2, n_recent, kv, dim)).astype(np.float16)
    keys = (key_codes.astype(np.float32) * key_scales.astype(np.float32)[..., None]).swapaxes(2, 3)
    values = value_codes.astype(np.float32) * value_scales.astype(np.float32)[..., None]
    views = [PageView(keys[i], values[i], page_positions[i] >= 0, page_positions[i]) for i in range(n_pages)]
    last_keys, last_values = recent.astype(np.float32).swapaxes(1, 2)
    views.append(PageView(last_keys, last_values, recent_positions >= 0, recent_positions))
    # Behind the back of the reference, which has its copies.
    value_scales[np.broadcast_to((page_positions < 0)[:, None], value_scales.shape)] = np.nan
    key_scales[(page_positions < 0).all(axis=1)] = np.nan
    recent[:, recent_positions < 0] = np.nan
    cache = (key_codes, key_scales, value_codes, value_scales, page_positions, recent[0], recent[1], recent_positions)
    return dict(zip(INLINE_CACHE, cache, strict=True)), views
