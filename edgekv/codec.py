"""The INT8 page codec: what a quantised page means. Pure NumPy, the reference for every kernel.

Symmetric INT8. Keys have one scale per channel within a page and head, because key outliers live in
channels; values have one scale per token and head (Source: KIVI, arXiv 2402.02750). Scales are fp16, rounded
*up* and rounded *before* they divide: decoding uses exactly the scale that encoding used, no code is ever clipped, and
the error is at most half a scale. A page is quantised once, from its fp16 form, when it is sealed, and never again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Int8 = NDArray[np.int8]
Half = NDArray[np.float16]

#: Changes when stored pages mean something else.
CODEC_VERSION = 1
#: The scale of an all-zero slice: the smallest fp16 above zero.
MIN_SCALE = np.float16(2.0**-24)


def _round_up_to_half(x: Float) -> Half:
    """Return the smallest fp16 not below each ``x`` (x >= 0, finite in fp16)."""
    nearest = x.astype(np.float16)
    return np.where(nearest.astype(np.float32) < x, np.nextafter(nearest, np.float16(np.inf)), nearest)


def _quantise(x: Float, axis: int) -> tuple[Int8, Half]:
    """Quantise ``x`` with one scale per slice along ``axis``; returns codes and scales (axis removed)."""
    peak = np.max(np.abs(x), axis=axis, initial=0.0)
    scale = np.maximum(_round_up_to_half(peak / np.float32(127)), MIN_SCALE)
    codes = np.rint(x / np.expand_dims(scale.astype(np.float32), axis))
    return codes.astype(np.int8), scale


def quantise_keys(keys: Float) -> tuple[Int8, Half]:
    """Quantise keys [page_size, n_kv_heads, head_dim]; unused slots must be zero.

    Returns:
        codes [page_size, n_kv_heads, head_dim] int8 and scales [n_kv_heads, head_dim] float16.
    """
    return _quantise(keys, axis=0)


def quantise_values(values: Float) -> tuple[Int8, Half]:
    """Quantise values [page_size, n_kv_heads, head_dim].

    Returns:
        codes [page_size, n_kv_heads, head_dim] int8 and scales [page_size, n_kv_heads] float16.
    """
    return _quantise(values, axis=2)


def pack_warm(keys: Float, values: Float, out: NDArray[np.uint8]) -> None:
    """Quantise one page of keys and values [page_size, n_kv_heads, head_dim] into ``out``.

    ``out`` is [warm_bytes] uint8 in the WARM layout of :class:`edgekv.spec.PageSpec`.
    """
    page_size, n_heads, head_dim = keys.shape
    k_codes, k_scales = quantise_keys(keys)
    v_codes, v_scales = quantise_values(values)
    n = keys.size
    # [P, H, D] -> [H, D/4, P, 4]
    out[:n] = k_codes.reshape(page_size, n_heads, head_dim // 4, 4).transpose(1, 2, 0, 3).ravel().view(np.uint8)
    # [P, H, D] -> [H, P/4, D, 4]
    out[n : 2 * n] = v_codes.reshape(page_size // 4, 4, n_heads, head_dim).transpose(2, 0, 3, 1).ravel().view(np.uint8)
    scales = np.concatenate([k_scales.ravel(), v_scales.T.ravel()])
    out[2 * n : 2 * n + scales.nbytes] = scales.view(np.uint8)


def unpack_warm_codes(
    pages: NDArray[np.uint8], n_kv_heads: int, head_dim: int, page_size: int
) -> tuple[Int8, Half, Int8, Half]:
    """Split WARM pages [..., warm_bytes] into plain arrays; any number of leading axes.

    Returns:
        key codes [..., n_kv_heads, page_size, head_dim] int8, key scales [..., n_kv_heads, head_dim] float16,
        value codes [..., n_kv_heads, page_size, head_dim] int8, value scales [..., n_kv_heads, page_size] float16.
    """
    n, lead = n_kv_heads * head_dim * page_size, pages.shape[:-1]
    k = pages[..., :n].view(np.int8).reshape(*lead, n_kv_heads, head_dim // 4, page_size, 4).swapaxes(-3, -2)
    v = pages[..., n : 2 * n].view(np.int8).reshape(*lead, n_kv_heads, page_size // 4, head_dim, 4).swapaxes(-2, -1)
    scales = pages[..., 2 * n : 2 * n + 2 * n_kv_heads * (head_dim + page_size)].view(np.float16)
    split = n_kv_heads * head_dim
    return (
        k.reshape(*lead, n_kv_heads, page_size, head_dim),
        scales[..., :split].reshape(*lead, n_kv_heads, head_dim),
        v.reshape(*lead, n_kv_heads, page_size, head_dim),
        scales[..., split:].reshape(*lead, n_kv_heads, page_size),
    )


def unpack_warm(page: NDArray[np.uint8], n_kv_heads: int, head_dim: int, page_size: int) -> tuple[Float, Float]:
    """Decode a WARM page to keys and values, both [n_kv_heads, page_size, head_dim] float32."""
    k, k_scales, v, v_scales = unpack_warm_codes(page, n_kv_heads, head_dim, page_size)
    keys = k.astype(np.float32) * k_scales.astype(np.float32)[:, None, :]
    values = v.astype(np.float32) * v_scales.astype(np.float32)[:, :, None]
    return keys, values


def split_hot(pages: NDArray[np.uint8], n_kv_heads: int, head_dim: int, page_size: int) -> tuple[Half, Half]:
    """View HOT pages [..., hot_bytes] as keys and values, both [..., n_kv_heads, page_size, head_dim] float16."""
    n, lead = n_kv_heads * head_dim * page_size, pages.shape[:-1]
    halves = pages[..., : 4 * n].view(np.float16)
    keys = halves[..., :n].reshape(*lead, n_kv_heads, head_dim, page_size).swapaxes(-2, -1)
    return keys, halves[..., n:].reshape(*lead, n_kv_heads, page_size, head_dim)


def unpack_hot(page: NDArray[np.uint8], n_kv_heads: int, head_dim: int, page_size: int) -> tuple[Float, Float]:
    """Decode a HOT page to keys and values, both [n_kv_heads, page_size, head_dim] float32."""
    keys, values = split_hot(page, n_kv_heads, head_dim, page_size)
    return keys.astype(np.float32), values.astype(np.float32)
