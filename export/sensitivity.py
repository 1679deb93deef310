"""What each product of a decoder would lose in int4, measured: where more bits are spent best.

Rounding that changes the weights of a matrix by R changes the distributions of a text's next tokens by a KL divergence of about

    1/2 sum over all weights of E[G^2] R^2,

where G is the gradient, with respect to the weight, of the logarithm of the likelihood of tokens drawn from these
distributions: the Fisher information, of which errors that know nothing of each other need the diagonal alone. Source: Kim et
al., "SqueezeLLM: Dense-and-Sparse Quantization", arXiv 2306.07629, section 4.1. A text goes through the decoder segment by
segment, and the gradient all the way back: memory holds one segment with its gradients, and what the text was before each.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from .checkpoint import Checkpoint
from .compensate import nearest
from .decoder import Projection, parameter_sources
from .rounding import Calibration, sequences
from .walk import Stream, Walk

Tensor = torch.Tensor

#: Sequences that are read: the costs of the products of the bundled model are within an eighth of those that 8 give.
SEQUENCES = 2
#: Projections that exporters make one product.
_STACKED = ("exit.gate_proj", "exit.up_proj")


def int4_costs(checkpoint: Checkpoint, calibration: Calibration) -> dict[tuple[str, ...], float]:
    """Return the KL divergence of each product in int4, by the tensors that it reads.

    Raises:
        UsageError: the calibration text has less than one sequence of tokens.
    """
    costs: dict[tuple[str, ...], float] = {}
    texts = sequences(checkpoint, calibration, SEQUENCES)
    for tokens in texts:
        for names, cost in _costs_of(checkpoint, tokens).items():
            costs[names] = costs.get(names, 0.0) + cost / len(texts)
    return costs


def _costs_of(checkpoint: Checkpoint, tokens: list[int]) -> dict[tuple[str, ...], float]:
    walk, last = Walk(checkpoint, [tokens]), checkpoint.config.model.n_layers
    before = []
    for index in range(last + 1):
        before += walk.streams
        if index < last:
            walk.advance(walk.load())
    costs: dict[tuple[str, ...], float] = {}
    gradients: list[Tensor] = []
    for index in reversed(range(last + 1)):
        segment = walk.load(index)
        weights = {
            path: module.weight.requires_grad_()
            for path, module in segment.named_modules()
            if isinstance(module, Projection)
        }
        inputs = [rows.detach().requires_grad_() for rows in before.pop().rows(slice(None))]
        with torch.enable_grad():
            if index == last:
                outputs = [_loss(segment(*inputs))]
            else:
                (stream,) = walk.behind(index, segment, [Stream(*inputs)])
                outputs = stream.rows(slice(None))
            found = torch.autograd.grad(outputs, [*inputs, *weights.values()], gradients or None)
        gradients = list(found[: len(inputs)])
        for path, gradient in zip(weights, found[len(inputs) :], strict=True):
            names = _product(checkpoint, index, path, weights)
            costs[names] = costs.get(names, 0.0) + _cost(weights[path].detach(), gradient) / len(tokens)
    return costs


def _cost(weight: Tensor, gradient: Tensor) -> float:
    error = nearest(weight).values(weight.shape[1]).sub_(weight)
    return 0.5 * float(error.mul_(gradient).square_().sum())


def _loss(logits: Tensor) -> Tensor:
    """Return the loss [] of tokens that are drawn from the distributions of logits [T, vocab_size]."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(logits, drawn, reduction="sum")


def _product(checkpoint: Checkpoint, index: int, path: str, projections: Collection[str]) -> tuple[str, ...]:
    """Return the tensors of the product that a projection of a segment is a part of."""
    paths = [each for each in projections if each in _STACKED] if path in _STACKED else [path]
    return tuple(name for each in paths for name in parameter_sources(checkpoint, index, f"{each}.weight"))
