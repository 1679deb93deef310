"""What is read from flash next: the pages of exact attention, some pieces ahead of the kernel, across layers and steps.

Exact attention needs the same pages in the same order at every step, so the guess is nearly always right. Where a page moved
meanwhile, the reader drops the guess and reads what is there now.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..pages.cache import KVCache
from ..pages.manager import tag
from ..pages.table import offloaded
from ..storage.record import Wanted
from ..storage.ring import PageReader


@dataclass(frozen=True)
class Piece:
    """Pages [start, stop) of a layer, and those among them that are on flash, with their records."""

    start: int
    stop: int
    pages: list[int]
    wanted: Wanted


@dataclass(frozen=True)
class _Plan:
    """The pieces of a layer, for these pages on flash or beyond with these records."""

    cold: NDArray[np.bool_]
    records: NDArray[np.int64]
    pieces: list[Piece]

    def fits(self, cold: NDArray[np.bool_], records: NDArray[np.int64]) -> bool:
        return np.array_equal(self.cold, cold) and np.array_equal(self.records, records)


def wanted_records(cache: KVCache, layer: int, pages: list[int]) -> Wanted:
    """Return the records of pages on flash."""
    records = cache.table.record[layer, pages].tolist()
    return Wanted(records, [tag(layer, page) for page in pages], cache.spec.warm_bytes)


class Lookahead:
    """Cuts layers into pieces, and keeps the reader busy with those that come next.

    Args:
        piece_pages: pages that are read at a time, a multiple of ``run_pages``, which the kernel takes at a time.
    """

    def __init__(self, cache: KVCache, reader: PageReader, piece_pages: int, run_pages: int) -> None:
        self._cache = cache
        self._reader = reader
        self._piece_pages = piece_pages
        self._run_pages = run_pages
        self._plans: dict[int, _Plan] = {}
        self._coming: Iterator[Piece] = iter(())  # what is requested next
        self._step_pieces = 0  # pieces that one step takes from flash, as far as is known

    def walk(self, layer: int, cold: NDArray[np.bool_]) -> Iterator[tuple[Piece, NDArray[np.uint64] | None]]:
        """Yield the pieces of a layer in logical order, and the addresses of its pages that came from flash.

        Args:
            cold: [n_pages] bool: the pages on flash.

        Raises:
            CorruptPage, StoreError: a page cannot be read.
        """
        pieces = self.pieces(layer, cold)
        for index, piece in enumerate(pieces):
            if not piece.pages:
                yield piece, None
                continue
            if not self._reader.ahead:
                self._coming = self._from(layer, index)
            self._fill()
            addresses, _ = self._reader.take(piece.wanted)
            if not self._reader.ahead:  # the guess was wrong
                self._coming = self._from(layer, index + 1)
            self._fill()
            yield piece, addresses

    def pieces(self, layer: int, cold: NDArray[np.bool_]) -> list[Piece]:
        """Cut the pages of a layer into pieces of whole runs."""
        records = self._cache.table.record[layer, : len(cold)]
        plan = self._plans.get(layer)
        if plan is None or not plan.fits(cold, records):
            plan = self._plans[layer] = _Plan(cold.copy(), records.copy(), list(self._cut(layer, cold)))
            self._step_pieces = sum(bool(piece.pages) for plan in self._plans.values() for piece in plan.pieces)
        return plan.pieces

    def _cut(self, layer: int, cold: NDArray[np.bool_]) -> Iterator[Piece]:
        start = 0
        held: list[int] = []
        for run in range(0, len(cold), self._run_pages):
            stop = min(run + self._run_pages, len(cold))
            in_run = (np.flatnonzero(cold[run:stop]) + run).tolist()
            if len(held) + len(in_run) > self._piece_pages:
                yield self._piece(layer, start, run, held)
                start, held = run, []
            held = held + in_run
        yield self._piece(layer, start, len(cold), held)

    def _piece(self, layer: int, start: int, stop: int, pages: list[int]) -> Piece:
        return Piece(start, stop, pages, wanted_records(self._cache, layer, pages))

    def _fill(self) -> None:
        """Request what comes next until the ring is full, or all that one step needs is on its way."""
        while self._reader.has_room and self._reader.ahead < self._step_pieces:
            piece = next(self._coming, None)
            if piece is None:
                return
            self._reader.request(piece.wanted)

    def _from(self, layer: int, index: int) -> Iterator[Piece]:
        """Yield the pieces with pages on flash from this one on, step after step, of each layer as it is when reached."""
        table, n_layers = self._cache.table, self._cache.spec.n_layers
        idle = 0  # layers in a row without anything on flash
        while idle <= n_layers:
            cold = offloaded(table.tier[layer, : table.n_pages(layer)])
            cold[: int(table.first_seen()[layer])] = False
            pieces = self.pieces(layer, cold)
            needed = [piece for piece in pieces[index:] if piece.pages]
            yield from needed
            idle = 0 if needed else idle + 1
            layer, index = (layer + 1) % n_layers, 0
