"""A matrix in whole numbers, block by block: what rounding gives, what some checkpoints hold, and what exporters write."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor

BLOCK = 32


@dataclass(frozen=True)
class Codes:
    """A matrix in codes of ``bits`` bits: value = (code - zero) * scale + offset.

    codes [rows, blocks * 32] uint8 (columns that fill up the last block are zeros), scales [rows, blocks] float32,
    zeros [rows, blocks] uint8, offsets [rows, blocks] float32 (None: all are 0).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int = 4
    offsets: Tensor | None = None

    def values(self, columns: int) -> Tensor:
        """Return what the codes stand for, float32 [rows, columns]."""
        rows = self.codes.shape[0]
        codes = self.codes.reshape(rows, -1, BLOCK).float() - self.zeros.float()[..., None]
        values = codes * self.scales[..., None]
        if self.offsets is not None:
            values = values + self.offsets[..., None]
        return values.reshape(rows, -1)[:, :columns]

    @property
    def middle(self) -> int:
        """The zero point of a matrix whose codes lie around 0."""
        return 1 << (self.bits - 1)

    @property
    def symmetric(self) -> bool:
        """Whether a value is a code's distance from the middle times its scale, in every block."""
        return self.offsets is None and bool((self.zeros == self.middle).all())

    def rearranged(self, rows: Callable[[Tensor], Tensor]) -> Codes:
        """Return the rows that ``rows`` makes of those of any tensor [rows, ...]: others of them, or in another order."""
        offsets = None if self.offsets is None else rows(self.offsets)
        return Codes(rows(self.codes), rows(self.scales), rows(self.zeros), self.bits, offsets)

    def scaled(self, factor: float) -> Codes:
        """Return the codes of all values times ``factor``."""
        offsets = None if self.offsets is None else self.offsets * factor
        return Codes(self.codes, self.scales * factor, self.zeros, self.bits, offsets)

    def in_eight_bits(self) -> Codes:
        """Return the same values in 8-bit codes around the middle; a symmetric matrix's alone."""
        assert self.symmetric, "values that lie to one side"
        return Codes(self.codes + (128 - self.middle), self.scales, torch.full_like(self.zeros, 128), 8)


@dataclass(frozen=True)
class StoredCodes:
    """The codes that a checkpoint holds of a matrix: their bits, known at once, and what reads them."""

    bits: int
    read: Callable[[], Codes]

    def changed(self, change: Callable[[Codes], Codes]) -> StoredCodes:
        """Return what ``change`` makes of them when they are read."""
        return StoredCodes(self.bits, functools.partial(_changed, self.read, change))


def _changed(read: Callable[[], Codes], change: Callable[[Codes], Codes]) -> Codes:
    return change(read())


def stacked(parts: Sequence[Codes]) -> Codes:
    """Return matrices of equal columns and bits, one below the other."""
    (bits,) = {part.bits for part in parts}
    offsets = None
    if any(part.offsets is not None for part in parts):
        offsets = torch.cat([torch.zeros_like(p.scales) if p.offsets is None else p.offsets for p in parts])
    codes, scales, zeros = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales", "zeros"))
    return Codes(codes, scales, zeros, bits, offsets)
