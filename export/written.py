"""What an exporter of an engine tells of the graphs that it wrote."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgekv.bundle import EmbeddingSpec, MatrixFacts


@dataclass(frozen=True)
class Written:
    """``graphs``: the names of their files, in the order in which they run. ``embedding``: where the runtime finds the rows
    (split form only). ``matrices``: see :class:`edgekv.bundle.Manifest`.
    """

    graphs: tuple[str, ...]
    embedding: EmbeddingSpec | None = None
    matrices: dict[str, dict[str, MatrixFacts]] = field(default_factory=dict)
