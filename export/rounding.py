"""Rounding to int4 in which each column makes up for the errors of those before it: GPTQ.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323.
A matrix W that meets inputs X shall give W X again, so what rounding one column adds is taken from the columns that are still to
be rounded, by the inverse of H = X X^T. The inputs come from a calibration text that goes through the decoder segment by segment,
each rounded before the next one sees what it gives: memory holds one segment and the text's hidden states.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import nn

from edgekv.errors import CheckpointError, UsageError

from .checkpoint import Checkpoint
from .codes import BLOCK, Codes
from .decoder import Projection, parameter_sources
from .walk import Walk

Tensor = torch.Tensor

LEVELS, MIDDLE = 15, 8
#: Gives scale and zero point [rows] of a block [rows, 32].
Grid = Callable[[Tensor], tuple[Tensor, Tensor]]
#: Tokens of a calibration sequence, and how many sequences there are at the most.
SEQUENCE, SEQUENCES = 512, 16
#: What is added to the diagonal of H, as a share of its mean. Source: the paper, section 4.
DAMPING = 0.01
#: Grids that are tried for a block, as shares of its range, and the power of the errors that tells the best one: cutting off what
#: is rare makes all others finer. Source of the power: the code of the paper's authors (2.4); 2.5 is a product and a root.
SHARES = tuple(1 - 0.02 * step for step in range(20))
#: Rows of a matrix that are rounded at a time: what that needs beside the matrix fits into memory, whatever the vocabulary.
ROWS = 4096
#: Products that read the same input.
_GROUPS = (("exit.o_proj",), ("exit.gate_proj", "exit.up_proj"), ("exit.down_proj",), ("entry.qkv_proj",))


@dataclass(frozen=True)
class Calibration:
    """A text whose tokens show what inputs a decoder's products meet. ``sha256``: of the text."""

    text: str
    sha256: str


def read_calibration(path: Path | None) -> Calibration:
    """Read a calibration text; None: the one that comes with edgekv, of two novels in the public domain.

    Raises:
        UsageError: the file cannot be read, or holds no text in UTF-8.
    """
    try:
        source = path or resources.files("edgekv.export").joinpath("calibration.txt")
        data = source.read_bytes()
        return Calibration(data.decode(), hashlib.sha256(data).hexdigest())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read the calibration text {path}: {error}; --calibration none does without"
        ) from error


class Compensator:
    """Gives the products of a decoder in int4, in the order of its segments.

    Args:
        grid: of a block: :func:`free_grid` or :func:`symmetric_grid`.
        head: the output head is asked for, too.

    Raises (when made):
        UsageError: the calibration text has less than one sequence of tokens.
    """

    def __init__(
        self, checkpoint: Checkpoint, calibration: Calibration, grid: Grid | None = None, *, head: bool = True
    ) -> None:
        from tokenizers import Tokenizer

        self._checkpoint, self._grid, self.head = checkpoint, grid or free_grid, head
        ids = Tokenizer.from_str(checkpoint.tokenizer.json).encode(calibration.text, add_special_tokens=False).ids
        length = min(SEQUENCE, checkpoint.config.model.max_context)
        count = min(len(ids) // length, SEQUENCES)
        if not count:
            raise UsageError(f"the calibration text has {len(ids)} tokens; it needs {length} or more")
        starts = [number * len(ids) // count for number in range(count)]  # from all of it
        self._walk = Walk(checkpoint, [ids[start : start + length] for start in starts])
        self._codes: dict[str, Codes] = {}

    def codes(self, names: Sequence[str]) -> list[Codes]:
        """Return tensors of one segment, each once; the decoder goes on until it is there."""
        while not all(name in self._codes for name in names):
            self._advance()
        return [self._codes.pop(name) for name in names]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _advance(self) -> None:
        index, n_layers = self._walk.segment, self._checkpoint.config.model.n_layers
        assert index <= n_layers, "the decoder has no such product"
        segment = self._walk.load(head=False)
        projections = {path: module for path, module in segment.named_modules() if isinstance(module, Projection)}
        groups = [here for group in _GROUPS if (here := [path for path in group if path in projections])]
        hessians = self._hessians(segment, [projections[group[0]] for group in groups])
        for group, hessian in zip(groups, hessians, strict=True):
            for path in group:
                self._round(projections[path], parameter_sources(self._checkpoint, index, f"{path}.weight"), hessian)
        if index == n_layers and self.head:  # it meets what all that was rounded before it gives
            name = self._checkpoint.head
            (hessian,) = self._hessians(segment, [segment.get_submodule("head")])
            self._codes[name] = compensate(self._checkpoint.tensor(name), hessian, self._grid)
        self._walk.advance(segment)

    def _hessians(self, segment: nn.Module, projections: Sequence[nn.Module]) -> list[Tensor]:
        """Return X^T X [columns, columns] of what each product meets in all sequences."""
        totals: list[Tensor | None] = [None] * len(projections)

        def add(number: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            met = inputs[0]
            total = totals[number]
            totals[number] = met.T @ met if total is None else total.addmm_(met.T, met)

        hooks = [p.register_forward_pre_hook(functools.partial(add, n)) for n, p in enumerate(projections)]
        for stream in self._walk.streams:
            self._walk.run(segment, stream)
        for hook in hooks:
            hook.remove()
        return [total for total in totals if total is not None]

    def _round(self, projection: Projection, names: Sequence[str], hessian: Tensor) -> None:
        columns = projection.weight.shape[1]
        codes = compensate(projection.weight, hessian, self._grid)
        projection.weight.copy_(codes.values(columns))
        first = 0
        for name in names:
            end = first + self._checkpoint.location[name].shape[0]
            self._codes[name] = Codes(codes.codes[first:end], codes.scales[first:end], codes.zeros[first:end])
            first = end


def compensate(weight: Tensor, hessian: Tensor, grid: Grid | None = None) -> Codes:
    """Round a matrix [rows, columns] to int4 in blocks of 32 columns, each with a scale and a zero point.

    Args:
        hessian: X^T X [columns, columns] of the inputs that it meets.
        grid: see :class:`Compensator`.

    Raises:
        CheckpointError: the inputs are not finite.
    """
    padding = -weight.shape[1] % BLOCK
    hessian = nn.functional.pad(hessian, (0, padding, 0, padding))
    diagonal = torch.diagonal(hessian)
    if not torch.isfinite(diagonal).all():
        raise CheckpointError("the calibration text overflows in this model; --calibration none does without")
    hessian = hessian + torch.diag(torch.where(diagonal > 0, DAMPING * diagonal.mean(), 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    parts = [
        _compensate(nn.functional.pad(rows.clone(), (0, padding)), factor, grid or free_grid)
        for rows in torch.split(weight, ROWS)
    ]
    codes, scales, zeros = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Codes(codes, scales, zeros)


def _compensate(weight: Tensor, factor: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Round rows, which it changes; returns what :class:`Codes` has.

    Args:
        factor: the upper Cholesky factor of the inverse of H.
    """
    codes, scales, zeros = torch.empty_like(weight, dtype=torch.uint8), [], []
    for first in range(0, weight.shape[1], BLOCK):
        end = first + BLOCK
        block = weight[:, first:end].clone()
        scale, zero = grid(block)
        errors = torch.empty_like(block)
        for column in range(BLOCK):
            row = factor[first + column, first:end]
            code = (block[:, column] / scale + zero).round_().clamp_(0, LEVELS)
            errors[:, column] = (block[:, column] - (code - zero) * scale) / row[column]
            block[:, column:] -= errors[:, column, None] * row[column:]
            codes[:, first + column] = code.to(torch.uint8)
        weight[:, end:] -= errors @ factor[first:end, end:]
        scales.append(scale)
        zeros.append(zero)
    return codes, torch.stack(scales, 1), torch.stack(zeros, 1).to(torch.uint8)


def free_grid(block: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point [rows] of a block [rows, 32]: 0 is on the grid, and the errors are least."""
    low, high = block.amin(1).clamp(max=0), block.amax(1).clamp(min=0)
    whole = (high - low) / LEVELS
    whole = torch.where(whole > 0, whole, 1.0)
    zero = (-low / whole).round()
    return _finest(block, [whole * share for share in SHARES], zero), zero


def symmetric_grid(block: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales that bfloat16 holds and the zero point 8 [rows] of a block [rows, 32]: what XNNPACK reads."""
    whole = block.abs().amax(1) / (LEVELS - MIDDLE)
    whole = torch.where(whole > 0, whole, 1.0)
    zero = torch.full_like(whole, MIDDLE)
    return _finest(block, [(whole * share).to(torch.bfloat16).float() for share in SHARES], zero), zero


def _finest(block: Tensor, scales: Sequence[Tensor], zero: Tensor) -> Tensor:
    """Return the scale of each row with which rounding changes the block least."""
    scale, best = scales[0], torch.full_like(zero, torch.inf)
    for tried in scales:
        codes = (block / tried[:, None] + zero[:, None]).round_().clamp_(0, LEVELS)
        error = codes.sub_(zero[:, None]).mul_(tried[:, None]).sub_(block).abs_()
        loss = (error.square() * error.sqrt()).sum(1)
        scale, best = torch.where(loss < best, tried, scale), torch.minimum(loss, best)
    return scale
