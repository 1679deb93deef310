"""A budget of bits: which products of a decoder are int8 among int4."""

from __future__ import annotations

import math
from collections.abc import Mapping

from edgekv.contract import MIXED
from edgekv.errors import UsageError

from .checkpoint import Checkpoint
from .codes import BLOCK
from .matrix_kinds import MatrixKinds
from .rounding import Calibration
from .sensitivity import int4_costs

#: Of a block of 32 weights, as ONNX Runtime's MatMulNBits reads it: codes, a float32 scale, and of int4 a zero point.
BLOCK_BITS = {"int4": 32 * 4 + 32 + 4, "int8": 32 * 8 + 32}
Product = tuple[str, ...]


def mixed_kinds(checkpoint: Checkpoint, bits: float, calibration: Calibration) -> MatrixKinds:
    """Return int8 for the products that lose most in int4 for their size, and int4 for the others.

    Args:
        bits: of a weight, scales and zero points included, over all matrices that products read.
        calibration: the text with which the loss is measured.

    Raises:
        UsageError: the bits are fewer than int4 has, or the text is too short.
    """
    shapes = {name: stored.shape for name, stored in checkpoint.location.items()}
    return allot(bits, int4_costs(checkpoint, calibration), shapes)


def allot(bits: float, costs: Mapping[Product, float], shapes: Mapping[str, tuple[int, ...]]) -> MatrixKinds:
    """See :func:`mixed_kinds`.

    Args:
        costs: of each product in int4, by its tensors.
        shapes: of the tensors.
    """
    least = {product: sum(_bits("int4", shapes[name]) for name in product) for product in costs}
    more = {product: sum(_bits("int8", shapes[name]) for name in product) - least[product] for product in costs}
    weights = sum(math.prod(shapes[name]) for product in costs for name in product)
    left = bits * weights - sum(least.values())
    if left < 0:
        enough = math.ceil(100 * sum(least.values()) / weights) / 100
        raise UsageError(
            f"--weights {MIXED}:{bits:g} is less than int4 has with its scales: at least {MIXED}:{enough:g}"
        )
    others: dict[str, str] = {}
    for product in sorted(costs, key=lambda product: -costs[product] / more[product]):
        if more[product] <= left:
            left -= more[product]
            others |= dict.fromkeys(product, "int8")
    return MatrixKinds("int4", others)


def _bits(kind: str, shape: tuple[int, ...]) -> int:
    rows, columns = shape
    return rows * -(-columns // BLOCK) * BLOCK_BITS[kind]
