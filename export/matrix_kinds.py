"""In which kind each matrix of a bundle is stored: the one place where that is decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgekv.contract import STORED
from edgekv.errors import UsageError

if TYPE_CHECKING:
    from .checkpoint import Checkpoint


@dataclass(frozen=True)
class MatrixKinds:
    """The kind of each matrix, one of :data:`edgekv.contract.WEIGHTS`.

    ``most``: of all that ``others`` does not name. ``others``: by the name of a tensor of the checkpoint
    (``model.layers.3.mlp.down_proj.weight``). What reads one input is one product (q, k and v; gate and up) where the kinds
    agree, and else one product for each run of equal kinds, which takes a little longer. ``stored``: a matrix whose codes the
    checkpoint holds in its kind's bits has these.
    """

    most: str
    others: Mapping[str, str] = field(default_factory=dict)
    stored: bool = False

    def of(self, name: str) -> str:
        """Return the kind of a tensor."""
        return self.others.get(name, self.most)

    @property
    def mixed(self) -> bool:
        """Whether matrices differ."""
        return any(kind != self.most for kind in self.others.values())


def choose_kinds(checkpoint: Checkpoint, weights: str) -> MatrixKinds:
    """Choose the kinds for what was asked for.

    Args:
        weights: one of :data:`edgekv.contract.WEIGHTS`, or STORED: as the checkpoint has them, which must be quantised. What it
            has in floats, or in blocks that are not of 32, is rounded to 8 bits, far finer than what it was rounded to before.

    Raises:
        UsageError: the checkpoint holds floats.
    """
    if weights != STORED:
        return MatrixKinds(weights)
    if not checkpoint.quantised:
        raise UsageError(
            f"{checkpoint.source} holds floats, and --weights {STORED} is for what is quantised; choose int4, int8, fp16 or fp32"
        )
    kinds = {name: f"int{stored.codes.bits if stored.codes else 8}" for name, stored in checkpoint.matrices.items()}
    count: Counter[str] = Counter()
    for name, kind in kinds.items():
        rows, columns = checkpoint.matrices[name].shape
        count[kind] += rows * columns
    ((most, _),) = count.most_common(1)
    return MatrixKinds(most, {name: kind for name, kind in kinds.items() if kind != most}, stored=True)
