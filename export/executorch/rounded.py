"""Int4 products of a segment that a compensator rounded, as XNNPACK reads them."""

from __future__ import annotations

from torch import nn

from ..checkpoint import Checkpoint
from ..compensate import SYMMETRIC
from ..decoder import Projection, parameter_sources
from ..rounding import Calibration, Compensator
from .weights import QuantisedLinear, of_codes


def compensating(checkpoint: Checkpoint, calibration: Calibration | None, *, head: bool) -> Compensator | None:
    """Return what rounds the products of a checkpoint; None without a calibration text.

    Args:
        head: it rounds the output head, too.
    """
    if calibration is None:
        return None
    return Compensator(checkpoint, calibration, SYMMETRIC, rounds=lambda name: head or name != checkpoint.head)


def rounded_products(
    checkpoint: Checkpoint, index: int, segment: nn.Module, compensator: Compensator | None
) -> dict[str, QuantisedLinear]:
    """Return the products of segment ``index`` that the compensator rounds, by their path."""
    if compensator is None:
        return {}
    result = {}
    for path, child in segment.named_modules():
        if not isinstance(child, Projection):
            continue
        names = parameter_sources(checkpoint, index, f"{path}.weight")
        if all(compensator.rounds(name) for name in names):
            result[path] = of_codes(compensator.codes(names), child.weight.shape[1])
    return result
