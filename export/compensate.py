"""Rounding of a matrix to int4 in which each column makes up for the errors of those before it, and of the layers before.

A matrix W that met X in the source meets X' in the rounded decoder, and shall give W X again. Three steps, each towards the least
|W' X' - W X|^2, which H = X' X'^T and D = (X - X') X'^T tell without the inputs themselves:

1. Away from W, towards the floats that give W X when they meet X': W + W D H^-1. Only a share of the way: the rest fits the
   calibration text alone. Source: Zhang et al., "Qronos: Correcting the Past by Shaping the Future in Post-Training
   Quantization", arXiv 2505.11695; Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration",
   arXiv 2504.02692.
2. Column by column, what rounding one adds is taken from those that are still to be rounded. Source: Frantar et al., "GPTQ:
   Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323.
3. Once more block by block: the scale that suits the codes best, then each code, with all others as they are. Source of the
   part about codes: Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", arXiv 2309.01885.

Matrices are columns first in here, [columns, rows]: what is done to a column is done to neighbours in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from edgekv.errors import CheckpointError

from .codes import BLOCK, Codes

Tensor = torch.Tensor

LEVELS, MIDDLE = 15, 8
#: What is added to the diagonal of H, as a share of its mean. Source: GPTQ, section 4.
DAMPING = 0.01
#: The share of step 1.
SHARE = 0.7
#: Grids that are tried for a block, as shares of its range, and the power of the errors that tells the best one: cutting off what
#: is rare makes all others finer. Source of the power: the code of GPTQ's authors (2.4); 2.5 is a product and a root.
SHARES = tuple(1 - 0.02 * step for step in range(20))
#: Rows of a matrix that are rounded at a time: what that needs beside the matrix fits into memory, whatever the vocabulary.
ROWS = 4096


@dataclass(frozen=True)
class Grid:
    """What the codes of a block may stand for.

    ``free``: it has a zero point of its own, else 8. ``scales``: the type that holds scales.
    """

    free: bool
    scales: torch.dtype

    def find(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point [rows] of a block [32, rows]: 0 is on the grid, and the errors are least."""
        if self.free:
            low, high = block.amin(0).clamp(max=0), block.amax(0).clamp(min=0)
            whole = (high - low) / LEVELS
        else:
            low, whole = torch.zeros(1), block.abs().amax(0) / (LEVELS - MIDDLE)
        whole = torch.where(whole > 0, whole, 1.0)
        zero = (-low / whole).round() if self.free else torch.full_like(whole, MIDDLE)
        return _finest(block, [self.held(whole * share) for share in SHARES], zero), zero

    def held(self, scales: Tensor) -> Tensor:
        """Return scales as they will be stored, float32."""
        return scales.to(self.scales).float()


FREE = Grid(free=True, scales=torch.float32)
#: What XNNPACK reads.
SYMMETRIC = Grid(free=False, scales=torch.bfloat16)


class Inputs:
    """What the inputs of a product say about how to round it.

    Args:
        met: X'^T [tokens, columns]: what it meets in the rounded decoder.
        exact: X^T, what it met in the source; None: the same.

    Raises:
        CheckpointError: they are not finite.
    """

    def __init__(self, met: Tensor, exact: Tensor | None = None) -> None:
        self.columns = met.shape[1]
        padding = (0, -self.columns % BLOCK)
        met = nn.functional.pad(met, padding)
        hessian = _product(met, met)
        drift = None if exact is None else _product(met, nn.functional.pad(exact, padding) - met)
        if not all(torch.isfinite(each).all() for each in (hessian, drift) if each is not None):
            raise CheckpointError("the calibration text overflows in this model; --calibration none does without")
        diagonal = torch.diagonal(hessian)
        self.hessian = hessian + torch.diag(torch.where(diagonal > 0, DAMPING * diagonal.mean(), 1.0))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.hessian.double()))
        self.factor = torch.linalg.cholesky(inverse, upper=True).float()
        self._turn = None if drift is None else SHARE * (inverse.float() @ drift)

    def wanted(self, rows: Tensor) -> Tensor:
        """Return what is to be rounded in place of rows [rows, columns], columns first."""
        columns = nn.functional.pad(rows, (0, -self.columns % BLOCK)).T
        return columns.contiguous() if self._turn is None else columns + self._turn @ columns


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left^T right; numpy knows when both are one, and computes half of it."""
    return torch.from_numpy(left.numpy().T @ right.numpy())


def compensate(weight: Tensor, inputs: Inputs, grid: Grid = FREE) -> Codes:
    """Round a matrix [rows, columns] to int4 in blocks of 32 columns, each with a scale and a zero point."""
    parts = [_compensate(inputs.wanted(rows), inputs, grid) for rows in torch.split(weight, ROWS)]
    codes, scales, zeros = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Codes(codes, scales, zeros)


def nearest(weight: Tensor, grid: Grid = FREE) -> Codes:
    """Round each weight of a matrix [rows, columns] to the nearest code."""
    parts = []
    for rows in torch.split(weight, ROWS):
        blocks = nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK)).reshape(-1, BLOCK).T.contiguous()
        scales, zeros = grid.find(blocks)
        codes = _nearest(blocks, scales, zeros).T.reshape(len(rows), -1).to(torch.uint8)
        parts.append((codes, scales.view(len(rows), -1), zeros.view(len(rows), -1).to(torch.uint8)))
    codes, scales, zeros = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Codes(codes, scales, zeros)


def _compensate(wanted: Tensor, inputs: Inputs, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Round [columns, rows]; returns what :class:`Codes` has."""
    codes, scales, zeros = _rounded(wanted.clone(), inputs.factor, grid)
    _refine(wanted, codes, scales, zeros, inputs.hessian, grid)
    return codes.T.to(torch.uint8).contiguous(), scales.T.contiguous(), zeros.T.to(torch.uint8).contiguous()


def _rounded(left: Tensor, factor: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Round column by column: step 2.

    Args:
        left: what is wanted [columns, rows], which it changes.
        factor: the upper Cholesky factor of the inverse of H.

    Returns:
        codes [columns, rows], scales and zero points [blocks, rows], float32.
    """
    columns, rows = left.shape
    codes, errors = torch.empty_like(left), torch.empty(BLOCK, rows)
    scales, zeros = torch.empty(2, columns // BLOCK, rows)
    for number, first in enumerate(range(0, columns, BLOCK)):
        end = first + BLOCK
        block = left[first:end]
        scale, zero = scales[number], zeros[number]
        scale[:], zero[:] = grid.find(block)
        for column in range(BLOCK):
            row = factor[first + column, first:end]
            code = codes[first + column]
            code[:] = _nearest(block[column], scale, zero)
            errors[column] = (block[column] - (code - zero) * scale) / row[column]
            block[column:] -= row[column:, None] * errors[column]
        left[end:] -= factor[first:end, end:].T @ errors
    return codes, scales, zeros


def _refine(wanted: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, grid: Grid) -> None:
    """Change codes and scales, block by block, to what suits all others best: step 3; shapes as :func:`_rounded` gives them."""
    steps = (codes.view(len(zeros), BLOCK, -1) - zeros[:, None]).view_as(codes)
    values = (steps.view(len(zeros), BLOCK, -1) * scales[:, None]).view_as(codes)
    pull = hessian @ (wanted - values)  # half of what the error falls by when a value rises, at first
    for number, first in enumerate(range(0, len(codes), BLOCK)):
        end = first + BLOCK
        within, here, zero = hessian[first:end, first:end], pull[first:end], zeros[number]
        before, taken = values[first:end], steps[first:end]
        curve = (taken * (within @ taken)).sum(0)
        change = torch.where(curve > 0, (taken * here).sum(0) / curve, 0.0)
        found = grid.held(scales[number] + change)
        scale = torch.where(found > 0, found, scales[number])
        block = taken * scale
        here -= within @ (block - before)
        for column in range(BLOCK):
            code = _nearest(block[column] + here[column] / within[column, column], scale, zero)
            value = (code - zero) * scale
            here -= within[column, :, None] * (value - block[column])
            block[column], codes[first + column] = value, code
        pull[end:] -= hessian[first:end, end:].T @ (block - before)
        scales[number] = scale


def _nearest(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (values / scale + zero).round_().clamp_(0, LEVELS)


def _finest(block: Tensor, scales: list[Tensor], zero: Tensor) -> Tensor:
    """Return the scale [rows] with which rounding changes a block [32, rows] least."""
    scale, best = scales[0], torch.full_like(zero, torch.inf)
    for tried in scales:
        error = _nearest(block, tried, zero).sub_(zero).mul_(tried).sub_(block).abs_()
        loss = (error.square() * error.sqrt()).sum(0)
        scale, best = torch.where(loss < best, tried, scale), torch.minimum(loss, best)
    return scale
