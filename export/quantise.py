"""Block-wise integer weights as ONNX Runtime's MatMulNBits reads them, made by ONNX Runtime's own quantiser.

A weight [rows, columns] becomes codes [rows, blocks, block bytes] uint8 and one float32 scale per block of 32
columns: value = (code - zero) * scale, with zero 8 (int4) or 128 (int8), low nibble first.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_root = logging.getLogger()
_level, _handlers = _root.level, list(_root.handlers)
from onnxruntime.quantization.matmul_nbits_quantizer import (  # noqa: E402
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)

# That import configures the root logger; a library must leave it to the program.
_root.handlers[:] = _handlers
_root.setLevel(_level)

BLOCK = 32
BITS = {"int4": 4, "int8": 8}


@dataclass(frozen=True)
class QuantisedWeight:
    """codes [rows, blocks, 32 * bits / 8] uint8, scales [rows, blocks] float32."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]


def quantise(weight: NDArray[np.float32], bits: int) -> QuantisedWeight:
    """Quantise weight [rows, columns]; columns that do not fill a block are padded with zeros."""
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits)
    codes, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weight.T))
    rows = weight.shape[0]
    return QuantisedWeight(codes.reshape(rows, -1, BLOCK * bits // 8), scales.reshape(rows, -1).astype(np.float32))
