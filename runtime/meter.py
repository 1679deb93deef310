"""What a run tells of itself while it goes on: a step began, a segment ran, pages were attended to, records were taken.

A plain run tells nobody (:data:`SILENT`). The emulator listens (:mod:`edgekv.emulator.charges.meter`): it lets the time pass that
a device would take, and may answer with a fault of the device's drive. Nothing that is told changes what the run does next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgekv.bundle import Manifest

from .kernels.interface import Int64, Refs


class Meter(Protocol):
    """Is told what happens. All calls come from the thread that runs the model, in the order in which things happen."""

    def loaded(self, manifest: Manifest) -> None:
        """The dense parts of a bundle are loaded."""
        ...

    # -- a step ------------------------------------------------------------------------------------------------

    def step_began(self, n_tokens: int) -> None:
        """A step of so many tokens begins."""
        ...

    def segment_ran(self) -> None:
        """A segment of the split form ran, but the last."""
        ...

    def head_ran(self, rows: int) -> None:
        """The last segment ran on so many rows."""
        ...

    def graph_ran(self, n_tokens: int, rows: int, hot: Sequence[int], warm: Sequence[int]) -> None:
        """The graph of the inline form ran: ``rows`` of logits, so many slots of fp16 and of INT8 pages, by layer."""
        ...

    # -- attention, one layer after another --------------------------------------------------------------------

    def attention_began(self, positions: Int64, window: int) -> None:
        """A layer begins to attend for the tokens at ``positions`` [T]; ``window`` 0 is the whole context."""
        ...

    def attended(self, refs: Refs) -> None:
        """The kernel came to these pages; those without an address it skipped."""
        ...

    def attention_ended(self) -> None:
        """The layer has attended to the new tokens too."""
        ...

    # -- a step of one token through all layers at once --------------------------------------------------------

    def token_began(self, refs: Refs, position: int) -> None:
        """A token at ``position`` attends to ``refs`` [n_layers, n_pages]; no page moves before every layer has attended."""
        ...

    def token_layer(self, layer: int, streamed: bool) -> int:
        """The segment of a layer ran and its attention too, over pages some of which were ``streamed`` from flash.

        Returns:
            -1, or the row of the layer's plan that the drive damaged.

        Raises:
            OSError: the drive failed.
        """
        ...

    # -- pages from flash --------------------------------------------------------------------------------------

    def ring_opened(self, n_slots: int) -> None:
        """There is a staging ring of so many slots; any earlier one is gone."""
        ...

    def asking(self) -> None:
        """Records are about to be asked for, into a slot of the ring."""
        ...

    def asked(self, slot: int) -> None:
        """The records for a slot are on their way."""
        ...

    def took(self, slot: int, n_records: int) -> None:
        """The records in a slot are there, and were taken."""
        ...

    def planned(self, layer: int, stops: Int64, counts: Int64, pages: Int64, places: Int64) -> None:
        """The kernels will stream a layer so; see :meth:`~edgekv.runtime.kernels.interface.RecordStreams.plan`."""
        ...

    def forgot(self) -> None:
        """What the kernels had read ahead is forgotten."""
        ...


class Silence:
    """A :class:`Meter` that nobody reads."""

    def loaded(self, manifest: Manifest) -> None:
        """Nobody is told."""

    def step_began(self, n_tokens: int) -> None:
        """Nobody is told."""

    def segment_ran(self) -> None:
        """Nobody is told."""

    def head_ran(self, rows: int) -> None:
        """Nobody is told."""

    def graph_ran(self, n_tokens: int, rows: int, hot: Sequence[int], warm: Sequence[int]) -> None:
        """Nobody is told."""

    def attention_began(self, positions: Int64, window: int) -> None:
        """Nobody is told."""

    def attended(self, refs: Refs) -> None:
        """Nobody is told."""

    def attention_ended(self) -> None:
        """Nobody is told."""

    def token_began(self, refs: Refs, position: int) -> None:
        """Nobody is told."""

    def token_layer(self, layer: int, streamed: bool) -> int:
        """Nobody is told, and nothing is damaged."""
        return -1

    def ring_opened(self, n_slots: int) -> None:
        """Nobody is told."""

    def asking(self) -> None:
        """Nobody is told."""

    def asked(self, slot: int) -> None:
        """Nobody is told."""

    def took(self, slot: int, n_records: int) -> None:
        """Nobody is told."""

    def planned(self, layer: int, stops: Int64, counts: Int64, pages: Int64, places: Int64) -> None:
        """Nobody is told."""

    def forgot(self) -> None:
        """Nobody is told."""


SILENT: Meter = Silence()
