"""Int4 products of a decoder, rounded for what a calibration text shows of their inputs.

The text goes through the decoder twice, side by side, segment by segment: as the source computes it, and with the products
rounded so far. A product is rounded when both come to it, so that it makes up for the errors before it, too: see
:mod:`edgekv.export.compensate`. Memory holds one segment, the text's hidden states and what the widest product gives.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import nn

from edgekv.errors import UsageError

from . import ops
from .checkpoint import Checkpoint
from .codes import Codes
from .compensate import FREE, Grid, Inputs, compensate
from .decoder import Projection, parameter_sources
from .walk import Walk

Tensor = torch.Tensor

#: Tokens of a calibration sequence, and how many sequences there are at the most.
SEQUENCE, SEQUENCES = 512, 16


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


def sequences(checkpoint: Checkpoint, calibration: Calibration, most: int) -> list[list[int]]:
    """Return sequences of a calibration text's tokens, from all of it.

    Raises:
        UsageError: it has less than one.
    """
    from tokenizers import Tokenizer

    ids = Tokenizer.from_str(checkpoint.tokenizer.json).encode(calibration.text, add_special_tokens=False).ids
    length = min(SEQUENCE, checkpoint.config.model.max_context)
    count = min(len(ids) // length, most)
    if not count:
        raise UsageError(f"the calibration text has {len(ids)} tokens; it needs {length} or more")
    starts = [number * len(ids) // count for number in range(count)]
    return [ids[start : start + length] for start in starts]


class Compensator:
    """Gives the products of a decoder in int4, in the order of its segments.

    Args:
        grid: what a block's codes may stand for.
        rounds: whether a tensor is asked for; the others stay as the source has them.

    Raises (when made):
        UsageError: the calibration text has less than one sequence of tokens.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        calibration: Calibration,
        grid: Grid = FREE,
        *,
        rounds: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self._checkpoint, self._grid, self.rounds = checkpoint, grid, rounds
        self._walk = Walk(checkpoint, sequences(checkpoint, calibration, SEQUENCES) * 2)
        self._codes: dict[str, Codes] = {}

    def codes(self, names: Sequence[str]) -> list[Codes]:
        """Return tensors of one segment, each once; the decoder goes on until it is there."""
        while not all(name in self._codes for name in names):
            self._advance()
        return [self._codes.pop(name) for name in names]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _advance(self) -> None:
        index = self._walk.segment
        assert index <= self._checkpoint.config.model.n_layers, "the decoder has no such product"
        segment, inputs = self._walk.load(head=False), _SharedInputs()
        for path, module in list(segment.named_modules()):
            if isinstance(module, Projection):
                names = parameter_sources(self._checkpoint, index, f"{path}.weight")
                if any(self.rounds(name) for name in names):
                    segment.set_submodule(path, _Rounded(module, functools.partial(self._round, names), inputs))
            elif path == "head" and self.rounds(self._checkpoint.head):
                segment.set_submodule(path, _RoundedHead(self._round_head, inputs))
        self._walk.advance(segment)

    def _round(self, names: Sequence[str], weight: Tensor, inputs: Inputs) -> Tensor:
        """Return the rows of these tensors [rows, columns] as the bundle will hold them."""
        heights = [self._checkpoint.location[name].shape[0] for name in names]
        parts = []
        for name, part in zip(names, torch.split(weight, heights), strict=True):
            if self.rounds(name):
                self._codes[name] = compensate(part, inputs, self._grid)
                part = self._codes[name].values(part.shape[1])
            parts.append(part)
        return torch.cat(parts)

    def _round_head(self, inputs: Inputs) -> None:
        name = self._checkpoint.head
        self._codes[name] = compensate(self._checkpoint.tensor(name), inputs, self._grid)


class _SharedInputs:
    """What the inputs of a product say, found out once for products that read the same."""

    def __init__(self) -> None:
        self._x: Tensor | None = None

    def of(self, x: Tensor) -> Inputs:
        """Return them for x [2 * tokens, columns]: as the source has them, and below as the rounded decoder does."""
        if x is not self._x:
            exact, met = x.chunk(2)
            self._x, self._inputs = x, Inputs(met, exact)
        return self._inputs


class _Rounded(nn.Module):
    """A projection that is rounded when its inputs come: the upper half meets it as it was, the lower half as it is then."""

    def __init__(
        self, projection: Projection, rounds: Callable[[Tensor, Inputs], Tensor], inputs: _SharedInputs
    ) -> None:
        super().__init__()
        self.projection, self._round, self._inputs = projection, rounds, inputs

    def forward(self, x: Tensor) -> Tensor:
        """Project x [2 * tokens, columns]."""
        weight, bias = self.projection.weight, self.projection.bias
        rounded = self._round(weight, self._inputs.of(x))
        exact, met = x.chunk(2)
        return torch.cat([ops.linear(exact, weight, bias), ops.linear(met, rounded, bias)])


class _RoundedHead(nn.Module):
    """The output head, which is rounded when its inputs come; nobody reads logits."""

    def __init__(self, rounds: Callable[[Inputs], None], inputs: _SharedInputs) -> None:
        super().__init__()
        self._round, self._inputs = rounds, inputs

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        self._round(self._inputs.of(x))
        return x
