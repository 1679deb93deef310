"""The codes of quantised tensors in a GGUF file, where blocks of 32 with a scale and an offset can hold them exactly.

Q4_0, Q5_0 and Q8_0 are a code times a scale, Q4_1 and Q4_K with an offset to each block of 32 (Q4_K keeps the scales and
offsets of eight blocks as whole numbers of two common ones). Their values are those that the package ``gguf`` computes, bit for
bit. Q2_K, Q3_K and Q6_K have blocks of 16; Q5_1 and Q5_K would need an offset beside 8 bits: these are read as floats.
Source of the layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..codes import BLOCK, Codes

Bytes = NDArray[np.uint8]
Float = NDArray[np.float32]
#: Sub-blocks of a block of Q4_K.
_SUB_BLOCKS = 8


def _halves(data: Bytes) -> Float:
    """Return little-endian float16 numbers [..., n, 2] bytes as float32 [..., n]."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _nibbles(data: Bytes) -> Bytes:
    """Return the low halves of bytes [..., n], then the high ones [..., 2 n]."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


def _around_middle(codes: Bytes, scales: Float, bits: int) -> Codes:
    """Return codes [rows, blocks, 32] whose value is their distance from the middle times scale [rows, blocks]."""
    zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
    return _codes(codes, scales, zeros, bits)


def _codes(codes: Bytes, scales: Float, zeros: Bytes, bits: int, offsets: Float | None = None) -> Codes:
    added = None if offsets is None else torch.from_numpy(offsets)
    flat, scale, zero = (torch.from_numpy(each) for each in (codes.reshape(len(codes), -1), scales, zeros))
    return Codes(flat, scale, zero, bits, added)


def _above(codes: Bytes, scales: Float, offsets: Float) -> Codes:
    """Return 4-bit codes [rows, blocks, 32] whose value is code * scale + offset [rows, blocks].

    The products round what they read to 8 bits, and that counts less the nearer to 0 the values are which codes stand for. So a
    zero point takes over what it can of an offset, unless float32 could not hold exactly what is left.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        zeros = np.nan_to_num(np.clip(np.round(-offsets / scales), 0, 15))
    left = offsets.astype(np.float64) + zeros * scales.astype(np.float64)
    exact = left == left.astype(np.float32)
    zeros, left = np.where(exact, zeros, 0), np.where(exact, left, offsets).astype(np.float32)
    return _codes(codes, scales, zeros.astype(np.uint8), 4, left)


def _q4_0(data: Bytes) -> Codes:
    return _around_middle(_nibbles(data[..., 2:]), _halves(data[..., :2])[..., 0], 4)


def _q4_1(data: Bytes) -> Codes:
    numbers = _halves(data[..., :4])
    return _above(_nibbles(data[..., 4:]), numbers[..., 0], numbers[..., 1])


def _q5_0(data: Bytes) -> Codes:
    highest = np.unpackbits(data[..., 2:6], axis=-1, bitorder="little")
    codes = np.bitwise_or(_nibbles(data[..., 6:]), highest << 4, dtype=np.uint8)
    return _around_middle(codes + np.uint8(128 - 16), _halves(data[..., :2])[..., 0], 8)


def _q8_0(data: Bytes) -> Codes:
    return _around_middle(data[..., 2:] ^ np.uint8(128), _halves(data[..., :2])[..., 0], 8)


def _q4_k(data: Bytes) -> Codes:
    rows = len(data)
    numbers, packed = _halves(data[..., :4]), data[..., 4:16].astype(np.uint8)
    # Six bits of each: four pairs in the first eight bytes, whose upper two bits are of the other four.
    low, high, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low & 63, rest & 15 | low >> 2 & 48], axis=-1).astype(np.float32)
    offsets = np.concatenate([high & 63, rest >> 4 | high >> 2 & 48], axis=-1).astype(np.float32)
    codes = _nibbles(data[..., 16:].reshape(rows, -1, 4, BLOCK))
    shape = (rows, data.shape[1] * _SUB_BLOCKS)
    return _above(
        codes.reshape(*shape, BLOCK),
        (scales * numbers[..., :1]).reshape(shape),
        (-offsets * numbers[..., 1:]).reshape(shape),
    )


#: By the name of a type: the bits of its codes, the bytes of a block, and what reads blocks [rows, blocks, bytes].
_TYPES: dict[str, tuple[int, int, Callable[[Bytes], Codes]]] = {
    "Q4_0": (4, 18, _q4_0),
    "Q4_1": (4, 20, _q4_1),
    "Q5_0": (8, 22, _q5_0),
    "Q8_0": (8, 34, _q8_0),
    "Q4_K": (4, 144, _q4_k),
}


def code_bits(kind: str) -> int | None:
    """Return the bits of the codes of a type of GGUF; None where it has none that can be taken over."""
    found = _TYPES.get(kind)
    return None if found is None else found[0]


def read_codes(kind: str, data: NDArray[Any]) -> Codes:
    """Return the codes of a matrix; data: its rows as they are stored."""
    _, block_bytes, read = _TYPES[kind]
    rows: Bytes = np.ascontiguousarray(data).view(np.uint8)
    return read(rows.reshape(len(rows), -1, block_bytes))
