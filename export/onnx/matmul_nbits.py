"""Block-wise integer weights as ONNX Runtime's MatMulNBits reads them, made by ONNX Runtime's own quantiser.

A weight [rows, columns] becomes codes [rows, blocks, block bytes] uint8, low nibble first, one float32 scale and maybe
a zero point per block of 32 columns: value = (code - zero) * scale. What is added to all values of a block is no part of
MatMulNBits: it is a product of its own, with the sums of the inputs of each block. (Zero points may be floats, and then
ONNX Runtime 1.32 takes a road on which a row took 24 ms instead of 0.2, 3072 x 576 on AVX2.)

Measured on the bundled model at int4 (KL divergence from the float32 model, body / head): round to nearest symmetric
0.0209 / 0.0097, with zero points 0.0184 / 0.0084, ONNX Runtime's k-quant 0.0193 / 0.0085. Its HQQ gives fractional
zero points, which the fast kernel does not take. So int4 without calibration is round to nearest with zero points, which
cost no time; with it, :mod:`edgekv.export.rounding`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

import edgekv.ort as edgekv_ort  # noqa: F401 - first: it loads ONNX Runtime in silence

_root = logging.getLogger()
_level, _handlers = _root.level, list(_root.handlers)
from onnxruntime.quantization.matmul_nbits_quantizer import (  # noqa: E402
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)

from ..codes import BLOCK, Codes, stacked  # noqa: E402

# That import configures the root logger; a library must leave it to the program.
_root.handlers[:] = _handlers
_root.setLevel(_level)

BITS = {"int4": 4, "int8": 8}


@dataclass(frozen=True)
class QuantisedWeight:
    """Codes [rows, blocks, 32 * bits / 8] uint8, scales [rows, blocks] float32.

    ``zeros`` [rows, (blocks * bits + 7) / 8] uint8; None: all are 2 ** (bits - 1). ``offsets`` [rows, blocks] float32, what is
    added to each value of a block; None: nothing.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8] | None
    offsets: NDArray[np.float32] | None = None


def pack(parts: Sequence[Codes]) -> QuantisedWeight:
    """Return the rows of matrices, one below the other, as MatMulNBits reads them."""
    whole = stacked(parts)
    codes, scales, zeros = whole.codes.numpy(), whole.scales.numpy(), whole.zeros.numpy()
    offsets = None if whole.offsets is None else whole.offsets.numpy()
    middle = bool((zeros == whole.middle).all())
    if whole.bits == 4:
        codes, zeros = _nibbles(codes), _nibbles(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))))
    codes = codes.reshape(len(codes), -1, BLOCK * whole.bits // 8)
    return QuantisedWeight(codes, scales, None if middle else zeros, offsets)


def _nibbles(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.bitwise_or(values[:, 0::2], np.left_shift(values[:, 1::2], 4), dtype=np.uint8)


def nearest(weight: NDArray[np.float32]) -> Codes:
    """Return weight [rows, columns] in 8 bits, each in the nearest code of a symmetric grid."""
    found = quantise(weight, 8, symmetric=True)
    codes = torch.from_numpy(found.codes.reshape(len(weight), -1))
    return Codes(codes, torch.from_numpy(found.scales), torch.full(found.scales.shape, 128, dtype=torch.uint8), 8)


def quantise(weight: NDArray[np.float32], bits: int, *, symmetric: bool) -> QuantisedWeight:
    """Quantise weight [rows, columns]; columns that do not fill a block are padded with zeros.

    Args:
        symmetric: no zero points: value = (code - 2 ** (bits - 1)) * scale. Otherwise each block has its own, packed
            like the codes.
    """
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=symmetric, bits=bits)
    transposed = np.ascontiguousarray(weight.T)
    codes, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(transposed)
    rows = weight.shape[0]
    return QuantisedWeight(
        codes.reshape(rows, -1, BLOCK * bits // 8),
        scales.reshape(rows, -1).astype(np.float32),
        None if symmetric else zeros.reshape(rows, -1),
    )
