"""The sequence that a generator has in its cache: how it grows, step by step, and how it is cut back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.bundle import Manifest, check_files
from edgekv.errors import KeysOverflow, NotFinite, OutOfPages, PromptTooLong

from .decoder.base import Rows
from .decoder.split import SplitForward
from .decoder.together import step_together
from .engines.base import Float
from .keeper import Keeper
from .machine import Machine
from .options import RunOptions, check_length
from .prepare import Prepared
from .sessions.folder import signals_held
from .sessions.restore import common_prefix
from .sessions.steps import Steps
from .turns import Turns


class OneSequence:
    """One sequence of tokens, on the cache that was prepared for it; who calls has the turn (:class:`Turns`)."""

    def __init__(self, folder: Path, manifest: Manifest, options: RunOptions, machine: Machine) -> None:
        self.folder = folder
        self.manifest = manifest
        self.options = options
        #: The cache of the sequence and what runs on it, once a prompt gave it a size.
        self.prepared: Prepared | None = None
        self._machine = machine
        self._turns = Turns()
        self._keeper: Keeper | None = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._tokens: list[int] = []  # whose keys and values are in the cache
        self._sequence: list[int] = []  # those in the cache, and what was asked for or generated after them
        self._steps = Steps(self.manifest.page_size)
        # Positions of the sequence behind the cache whose tokens were pruned before they were cut off.
        self._gone: NDArray[np.int64] = np.empty(0, np.int64)

    def _save(self, *, whole: bool = False) -> None:
        if self._keeper is not None and self.prepared is not None:
            cache, n_kv = self.prepared.cache, len(self._tokens)
            self._keeper.save(cache, n_kv, self._sequence, self._steps, self._gone, whole=whole)

    def _run(self, tokens: Sequence[int], rows: Rows) -> Float:
        """Add tokens to the sequence in one step, and return their logits, valid until the next one."""
        start = self._begin_step(len(tokens))
        prepared = self.prepared
        assert prepared is not None
        try:
            positions = np.arange(start, start + len(tokens), dtype=np.int64)
            logits = prepared.forward.step(np.asarray(tokens, np.int64), positions, rows)
            _check_finite(logits, start + len(tokens) - len(logits))
            self._tokens += map(int, tokens)
        except BaseException as error:
            self._take_back(start, error)
            raise
        self._end_step(start)
        return logits

    def _begin_step(self, n_tokens: int) -> int:
        """Make ready for a step, and return at which position it begins."""
        self._turns.check_open()
        assert self.prepared is not None
        self.prepared.governor.between_steps()
        start = len(self._tokens)
        check_length(self.options, self.manifest.model.max_context, start + n_tokens)
        return start

    def _take_back(self, start: int, error: BaseException) -> None:
        # A step that failed half way leaves some layers longer than others: back to what all of them hold.
        self._shorten(start)
        # Did the medium spoil weights since they were hashed?
        if isinstance(error, NotFinite | KeysOverflow):
            check_files(self.folder, self.manifest)
        assert self.prepared is not None
        if isinstance(error, OutOfPages) and start >= self.prepared.context:
            raise PromptTooLong(
                f"the cache was made for {self.prepared.context} tokens, prompt and answer, and is full; give prefill() a larger"
                " max_tokens, or RunOptions a context"
            ) from error

    def _end_step(self, start: int) -> None:
        if self._sequence[start : len(self._tokens)] != self._tokens[start:]:
            self._sequence[start:] = self._tokens[start:]
        self._steps.add(start, len(self._tokens))
        self._prune_again()
        if self._keeper is not None:
            assert self.prepared is not None
            self._keeper.stepped(self.prepared.cache, len(self._tokens), self._sequence, self._steps, self._gone)

    @property
    def may_step_together(self) -> bool:
        """Whether the next token of the sequence can be run beside those of others: all its pages can be reached at once."""
        forward = self.prepared.forward if self.prepared is not None else None
        return isinstance(forward, SplitForward) and forward.goes_at_once(1, "last")

    @staticmethod
    def _run_together(sequences: Sequence[OneSequence], tokens: Sequence[int]) -> Float:
        """Add one token to each sequence, in one step, and return their logits [n, vocab_size]."""
        starts = [sequence._begin_step(1) for sequence in sequences]
        forwards = [sequence.prepared.forward for sequence in sequences if sequence.prepared is not None]
        try:
            logits = step_together([one for one in forwards if isinstance(one, SplitForward)], tokens, starts)
            for row, start in enumerate(starts):
                _check_finite(logits[row : row + 1], start)
        except BaseException as error:
            for sequence, start in zip(sequences, starts, strict=True):
                sequence._take_back(start, error)
            raise
        for sequence, start, token in zip(sequences, starts, tokens, strict=True):
            sequence._tokens.append(int(token))
            sequence._end_step(start)
        return logits

    def _catch_up(self) -> None:
        """Compute what the sequence has beyond the cache: its last token, or what was cut back with the step it was part of."""
        pending = self._sequence[len(self._tokens) :]
        if pending:
            self._extend(pending, "none")

    def _extend(self, tokens: Sequence[int], rows: Rows) -> list[Float]:
        """Add tokens in the steps of a prompt, and return the logits of each step."""
        parts, first = [], len(self._tokens)
        while (done := len(self._tokens) - first) < len(tokens):
            stop = self._steps.next_stop(first + done, first + len(tokens), self.options.prefill_chunk)
            parts.append(self._run(tokens[done : stop - first], rows).copy())
        return parts

    def _reuse(self, prompt: Sequence[int]) -> int:
        """Cut the cache to what the prompt begins with alike; at least the last token is computed again, for its logits."""
        assert self.prepared is not None
        if self._keeper is not None:
            restored = self._keeper.restore(self.prepared.cache, prompt)
            if restored is not None:
                self._gone = self._gone[self._gone < common_prefix(self._sequence, prompt)]
                self._gone = np.union1d(self._gone, restored.gone)
                self._tokens, self._sequence = list(prompt[: restored.count]), list(prompt)
                self._steps = restored.steps
                self._prune_again()
        self._follow(prompt)
        if len(self._tokens) == len(prompt):
            self._shorten(self._steps.keep(len(prompt) - 1, len(prompt)))
        return len(self._tokens)

    def _follow(self, sequence: Sequence[int]) -> None:
        """Let the sequence be another one; what both begin with alike stays, back to where a step began."""
        common = common_prefix(self._sequence, sequence)
        if common < self._steps.end:
            self._steps.cut(self._steps.keep(common))
            if len(self._tokens) > self._steps.end:
                self._shorten(self._steps.end)
                if not self._tokens:  # it could not be cut: all is read as in a fresh run
                    self._steps.cut(0)
        self._gone = self._gone[self._gone < common]
        self._sequence = list(sequence)

    def _shorten(self, count: int) -> None:
        """Keep ``count`` tokens in the cache, or less where it cannot be cut there: then the steps to there are repeated."""
        assert self.prepared is not None
        with signals_held():
            while (held := self.prepared.cache.truncate(count)) < count:
                count = self._steps.keep(held, -1)
            self._gone = self._pruned_from(count)
            del self._tokens[count:]

    def _pruned_from(self, count: int) -> NDArray[np.int64]:
        """Return which positions from ``count`` on were pruned, in the cache or before they were cut off."""
        assert self.prepared is not None
        pruned = self.prepared.cache.pruned()
        return np.union1d(self._gone, pruned[(pruned >= count) & (pruned < len(self._tokens))])

    def _prune_again(self) -> None:
        """Prune what the cache holds again of the tokens that were pruned before they were cut off."""
        if not self._gone.size:  # of nearly every step
            return
        again = self._gone < len(self._tokens)
        if again.any():
            assert self.prepared is not None
            self.prepared.cache.prune(self._gone[again])
            self._gone = self._gone[~again]


def _check_finite(logits: Float, first: int) -> None:
    """Refuse logits [R, vocab_size] of positions ``first`` and on from which no token can be chosen.

    Raises:
        NotFinite: one is NaN or infinite; the error names the position.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(
            np.add.reduce(logits, axis=None)
        ):  # NaN and infinity show in the sum: one pass, 20 us for 128k logits
            return
    wrong = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if wrong.size:
        raise NotFinite(
            f"the logits at token {first + int(wrong[0])} are not finite (NaN or infinite): weights or activations overflow;"
            " export the model again with --weights fp32 or int8"
        )
