"""In which kind each matrix of a bundle is stored: the one place where that is decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import Checkpoint


@dataclass(frozen=True)
class MatrixKinds:
    """The kind of each matrix, one of :data:`edgekv.contract.WEIGHTS`.

    ``most``: of all that ``others`` does not name. ``others``: by the name of a tensor of the checkpoint
    (``model.layers.3.mlp.down_proj.weight``). What reads one input is one product (q, k and v; gate and up) where the kinds
    agree, and else one product for each run of equal kinds, which takes a little longer.
    """

    most: str
    others: Mapping[str, str] = field(default_factory=dict)

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
        weights: one of :data:`edgekv.contract.WEIGHTS`.
    """
    return MatrixKinds(weights)
