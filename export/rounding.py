"""Rounding to int4 in which each column makes up for the errors of those before it: GPTQ.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323.
A matrix W that meets inputs X shall give W X again, so what rounding one column adds is taken from the columns that are still to
be rounded, by the inverse of H = X X^T. The inputs come from a calibration text that goes through the decoder segment by segment,
each rounded before the next one sees what it gives: memory holds one segment and the text's hidden states.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgekv.errors import CheckpointError, UsageError

from .checkpoint import EMBEDDING, Checkpoint
from .decoder import Projection, build_segment, load_parameter, parameter_sources
from .positions import Positions

Tensor = torch.Tensor

BLOCK = 32
LEVELS = 15
#: Tokens of a calibration sequence, and how many sequences there are at the most.
SEQUENCE, SEQUENCES = 512, 32
#: What is added to the diagonal of H, as a share of its mean. Source: the paper, section 4.
DAMPING = 0.01
#: Products that read the same input.
_GROUPS = (("exit.o_proj",), ("exit.gate_proj", "exit.up_proj"), ("exit.down_proj",), ("entry.qkv_proj",))


@dataclass(frozen=True)
class Codes:
    """A matrix in int4: value = (code - zero) * scale.

    codes [rows, blocks * 32] uint8 (columns that fill up the last block are zeros), scales [rows, blocks] float32,
    zeros [rows, blocks] uint8.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def values(self, columns: int) -> Tensor:
        """Return what the codes stand for, float32 [rows, columns]."""
        rows = self.codes.shape[0]
        codes = self.codes.reshape(rows, -1, BLOCK).float() - self.zeros.float()[..., None]
        return (codes * self.scales[..., None]).reshape(rows, -1)[:, :columns]


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

    Raises (when made):
        UsageError: the calibration text has less than one sequence of tokens.
    """

    def __init__(self, checkpoint: Checkpoint, calibration: Calibration) -> None:
        from tokenizers import Tokenizer

        self._checkpoint = checkpoint
        model = checkpoint.config.model
        ids = Tokenizer.from_str(checkpoint.tokenizer.json).encode(calibration.text, add_special_tokens=False).ids
        length = min(SEQUENCE, model.max_context)
        count = min(len(ids) // length, SEQUENCES)
        if not count:
            raise UsageError(f"the calibration text has {len(ids)} tokens; it needs {length} or more")
        embedding = checkpoint.tensor(EMBEDDING)
        self._streams = [_Stream(embedding[ids[i * length : (i + 1) * length]]) for i in range(count)]
        positions = torch.arange(length)
        self._turned = Positions(model).turned(positions)
        self._distance = positions[:, None] - positions[None, :]
        self._segment = 0
        self._codes: dict[str, Codes] = {}

    def codes(self, names: Sequence[str]) -> list[Codes]:
        """Return tensors of one segment, each once; the decoder goes on until it is there."""
        while not all(name in self._codes for name in names):
            self._advance()
        return [self._codes.pop(name) for name in names]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _advance(self) -> None:
        index, n_layers = self._segment, self._checkpoint.config.model.n_layers
        assert index <= n_layers, "the decoder has no such product"
        segment = self._load(index)
        projections = {path: module for path, module in segment.named_modules() if isinstance(module, Projection)}
        groups = [here for group in _GROUPS if (here := [path for path in group if path in projections])]
        hessians = self._hessians(segment, [projections[group[0]] for group in groups])
        for group, hessian in zip(groups, hessians, strict=True):
            for path in group:
                self._round(projections[path], parameter_sources(self._checkpoint, index, f"{path}.weight"), hessian)
        if index < n_layers:
            window = self._checkpoint.config.model.windows[index]
            for stream in self._streams:
                *residual, q, k, v = self._run(segment, stream)
                stream.residual = residual[0] if residual else stream.residual
                stream.attention = self._attend(q, k, v, window)
        self._segment += 1

    def _load(self, index: int) -> nn.Module:
        segment = build_segment(self._checkpoint.config, index)
        if index == self._checkpoint.config.model.n_layers:
            segment.head = nn.Identity()  # nothing is learnt from the logits
        segment = segment.to_empty(device="cpu").requires_grad_(False)
        for name, parameter in segment.named_parameters():
            parameter.copy_(load_parameter(self._checkpoint, index, name))
        return segment

    def _run(self, segment: nn.Module, stream: _Stream) -> tuple[Tensor, ...]:
        inputs = [stream.residual]
        if stream.attention is not None:
            inputs.append(stream.attention)
        model = self._checkpoint.config.model
        if self._segment < model.n_layers:
            inputs += self._turned[model.rope_of(self._segment)]
        outputs = segment(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _hessians(self, segment: nn.Module, projections: Sequence[Projection]) -> list[Tensor]:
        """Return X^T X [columns, columns] of what each product meets in all sequences."""
        totals, hooks = [], []
        for projection in projections:
            total = torch.zeros(projection.weight.shape[1], projection.weight.shape[1])
            hooks.append(projection.register_forward_pre_hook(functools.partial(_add, total)))
            totals.append(total)
        for stream in self._streams:
            self._run(segment, stream)
        for hook in hooks:
            hook.remove()
        return totals

    def _round(self, projection: Projection, names: Sequence[str], hessian: Tensor) -> None:
        columns = projection.weight.shape[1]
        codes = compensate(projection.weight, hessian)
        projection.weight.copy_(codes.values(columns))
        first = 0
        for name in names:
            end = first + self._checkpoint.location[name].shape[0]
            self._codes[name] = Codes(codes.codes[first:end], codes.scales[first:end], codes.zeros[first:end])
            first = end

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        model = self._checkpoint.config.model
        group = model.n_q_heads // model.n_kv_heads
        seen = (self._distance >= 0) & (self._distance < (window or len(q)))
        q, k, v = q.transpose(0, 1), *(part.repeat_interleave(group, 1).transpose(0, 1) for part in (k, v))
        if model.softcap:
            scores = model.softcap * torch.tanh(q @ k.transpose(1, 2) * (model.softmax_scale / model.softcap))
            attended = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1) @ v
        else:
            attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=model.softmax_scale)
        return attended.transpose(0, 1)


@dataclass
class _Stream:
    """Where a calibration sequence has come to: residual [T, hidden], attention of the last layer [T, heads, head_dim]."""

    residual: Tensor
    attention: Tensor | None = None


def _add(total: Tensor, module: nn.Module, inputs: Any) -> None:
    total.addmm_(inputs[0].T, inputs[0])


def compensate(weight: Tensor, hessian: Tensor) -> Codes:
    """Round a matrix [rows, columns] to int4 in blocks of 32 columns, each with a scale and a zero point.

    Args:
        hessian: X^T X [columns, columns] of the inputs that it meets.

    Raises:
        CheckpointError: the inputs are not finite.
    """
    padding = -weight.shape[1] % BLOCK
    weight = nn.functional.pad(weight, (0, padding)).clone()
    hessian = nn.functional.pad(hessian, (0, padding, 0, padding))
    diagonal = torch.diagonal(hessian)
    if not torch.isfinite(diagonal).all():
        raise CheckpointError("the calibration text overflows in this model; --calibration none does without")
    hessian = hessian + torch.diag(torch.where(diagonal > 0, DAMPING * diagonal.mean(), 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    codes, scales, zeros = torch.empty_like(weight, dtype=torch.uint8), [], []
    for first in range(0, weight.shape[1], BLOCK):
        end = first + BLOCK
        block = weight[:, first:end].clone()
        scale, zero = _grid(block)
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
    return Codes(codes, torch.stack(scales, 1), torch.stack(zeros, 1).to(torch.uint8))


def _grid(block: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point [rows] of a block [rows, 32]: from its least to its largest value, 0 among them."""
    low, high = block.amin(1).clamp(max=0), block.amax(1).clamp(min=0)
    scale = (high - low) / LEVELS
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (-low / scale).round()
