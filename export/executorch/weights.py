"""Weights in the bytes that the XNNPACK delegate of an ExecuTorch program reads, and their keys.

XNNPACK finds each constant of a graph under the sha256 of its bytes (scales: with a prefix). So a constant can be
replaced by another of the same shape without touching the graph: :mod:`edgekv.export.executorch.program` does.

================  ==================================================  ==========================
kind              weight [rows, columns]                              scales
================  ==================================================  ==========================
``fp32``          float32
``int8``          int8, one scale per row                             float32 [rows]
``int4``          code + 8, two per byte, low nibble first            bfloat16 [rows, columns/32]
================  ==================================================  ==========================

Activations are quantised to INT8 per token while it runs (int8, int4).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgekv.errors import UsageError

from ..codes import Codes
from ..compensate import MIDDLE

Tensor = torch.Tensor
GROUP = 32
SCALE_PREFIX = "scale_"
#: Scales that :func:`quantise` tries for a group of int4 weights, as shares of what avoids all clipping.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True)
class Constant:
    """One constant of a graph: the key under which XNNPACK looks for it, and its bytes."""

    key: str
    data: bytes


@dataclass(frozen=True)
class QuantisedLinear:
    """codes [rows, columns] int8, scales [rows, groups]: bfloat16 (int4), float32 with one group (int8)."""

    codes: Tensor
    scales: Tensor

    def dequantise(self) -> Tensor:
        """Return what the codes stand for, float32 [rows, columns]."""
        rows, columns = self.codes.shape
        scales = self.scales.float().reshape(rows, -1, 1)
        return (self.codes.float().reshape(rows, scales.shape[1], -1) * scales).reshape(rows, columns)


def check_columns(kind: str, columns: int, name: str) -> None:
    """Refuse a matrix that XNNPACK cannot take in groups.

    Raises:
        UsageError: int4 needs a multiple of 32 columns.
    """
    if kind == "int4" and columns % GROUP:
        raise UsageError(
            f"{name} has {columns} columns, and int4 on ExecuTorch needs a multiple of {GROUP}; use --weights int8"
        )


def quantise(weight: Tensor, kind: str) -> QuantisedLinear:
    """Quantise weight [rows, columns] float32, symmetric; ``kind`` is ``int8`` or ``int4``.

    int8: one scale per row. int4: one per 32 columns, the one with the least squared error of a few.
    """
    rows, columns = weight.shape
    if kind == "int8":
        scales = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
        return QuantisedLinear((weight / scales).round_().clamp_(-127, 127).to(torch.int8), scales)
    groups = weight.reshape(rows, columns // GROUP, GROUP)
    top = (groups.abs().amax(2, keepdim=True) / 7).clamp_min(1e-12)
    best_error: Tensor | None = None
    best_codes, best_scales = groups, top
    for share in _SHRINK:
        scales = (top * share).to(torch.bfloat16).float()
        codes = (groups / scales).round_().clamp_(-8, 7)
        error = (codes * scales - groups).square_().sum(2, keepdim=True)
        if best_error is None:
            best_error, best_codes, best_scales = error, codes, scales
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_codes = torch.where(better, codes, best_codes)
        best_scales = torch.where(better, scales, best_scales)
    return QuantisedLinear(best_codes.to(torch.int8).reshape(rows, columns), best_scales.squeeze(2).to(torch.bfloat16))


def of_codes(parts: Sequence[Codes], columns: int) -> QuantisedLinear:
    """Return int4 matrices with the zero point 8, one below the other, as XNNPACK reads them."""
    codes = torch.cat([part.codes for part in parts])[:, :columns].to(torch.int8) - MIDDLE
    return QuantisedLinear(codes, torch.cat([part.scales for part in parts]).to(torch.bfloat16))


def vector_constants(value: Tensor) -> list[Constant]:
    """Return the constant of a norm's gain or a bias."""
    return [_constant(value.float())]


def matrix_constants(weight: Tensor, kind: str) -> list[Constant]:
    """Return the constants of a matrix [rows, columns] float32: codes, then scales; or the matrix itself."""
    if kind == "fp32":
        return [_constant(weight.float())]
    return quantised_constants(quantise(weight, kind), kind)


def quantised_constants(quantised: QuantisedLinear, kind: str) -> list[Constant]:
    """Return the constants of a quantised matrix: codes, then scales."""
    codes = packed_codes(quantised.codes) if kind == "int4" else quantised.codes
    scales = _constant(quantised.scales)
    return [_constant(codes), Constant(SCALE_PREFIX + scales.key, scales.data)]


def packed_codes(codes: Tensor) -> Tensor:
    """Return int4 codes [rows, columns] as uint8 [rows, columns / 2]."""
    shifted = (codes + 8).to(torch.uint8).reshape(codes.shape[0], -1, 2)
    return shifted[..., 0] | shifted[..., 1] << 4


def _constant(value: Tensor) -> Constant:
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Constant(hashlib.sha256(data).hexdigest(), data)
