"""Between a generator and its session: when to save, and what to restore.

Tokens of the open page, which a checkpoint does not store, are computed again in the same steps. Those among them that were
pruned are pruned again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgekv import settings
from edgekv.bundle import Manifest
from edgekv.errors import StoreError, UsageError
from edgekv.tiers import KVMode

from .machine import HOST, Machine
from .options import RunOptions, SessionOptions
from .pages.cache import KVCache
from .sessions.index import from_ranges
from .sessions.prefixes import open_prefix
from .sessions.restore import common_prefix
from .sessions.session import Session
from .sessions.steps import Steps
from .storage.interface import Kept


class Keeper(Protocol):
    """Keeps the sequences of one generator beyond its cache. Methods: see :class:`SessionKeeper`."""

    @property
    def kept(self) -> Kept:
        """Where pages are kept."""
        ...

    def restore(self, cache: KVCache, prompt: Sequence[int], sequence: Sequence[int]) -> tuple[int, Steps] | None:
        """Bring what is kept of a prompt into the cache; None: what is in it stays."""
        ...

    def began(self, cache: KVCache, reused: int, total: int) -> None:
        """A prompt begins."""
        ...

    def stepped(self, cache: KVCache, n_kv: int, sequence: Sequence[int], steps: Steps) -> None:
        """A step is done."""
        ...

    def save(self, cache: KVCache, n_kv: int, sequence: Sequence[int], steps: Steps, *, whole: bool) -> None:
        """Keep what the cache holds."""
        ...

    def abandon(self) -> None:
        """Let go as the end of the process would."""
        ...

    def close(self) -> None:
        """Let go."""
        ...


class SessionKeeper:
    """Keeps the sequence of one generator in a session.

    Raises (from the constructor):
        UsageError: fp16 pages, dropping or another place for pages were asked for. StoreLocked, SessionMismatch, SessionError:
            see :meth:`Session.open`.
    """

    def __init__(
        self, options: RunOptions, manifest: Manifest, session: Session | None = None, machine: Machine = HOST
    ) -> None:
        if options.kv == KVMode.FP16:
            raise UsageError("a session keeps INT8 pages: run it with --kv auto or int8")
        if options.allow_drop:
            raise UsageError("a session keeps every page: run it without --allow-drop")
        self._manifest = manifest
        self._now = machine.now
        if session is None:
            assert options.session is not None
            if options.offload is not None:
                raise UsageError("a session keeps its pages in its own files: run it without --offload")
            if options.encrypt_offload and options.session.secret is None:
                raise UsageError("a session keeps its pages in its own files: encrypt it, with a secret of its own")
            limit = settings.MAX_WRITE_PER_DAY.optional(options.max_write_per_day)
            limited = replace(options.session, max_bytes_per_day=limit)
            session = Session.open(limited, manifest, medium=machine.open_medium())
        self.session = session
        self.options = options.session or SessionOptions(session.path, 0)
        self._cache: KVCache | None = None
        #: Positions that are computed again, and were pruned.
        self._gone: NDArray[np.int64] = np.empty(0, np.int64)
        self._saved = (0, self._now())

    @property
    def kept(self) -> Session:
        """The session."""
        return self.session

    def restore(self, cache: KVCache, prompt: Sequence[int], sequence: Sequence[int]) -> tuple[int, Steps] | None:
        """Fill a new cache from the session; returns how many tokens of the prompt it holds now and in which steps.

        Args:
            sequence: what the prompt replaces; nothing is restored, and None returned, where the cache is in use.

        Raises:
            StoreError: the medium refused.
        """
        known = sequence if cache is self._cache else self.session.tokens
        gone = self._gone if cache is self._cache else from_ranges(self.session.state.tail.pruned)
        self._gone = gone[gone < common_prefix(known, prompt)]
        if cache is self._cache:
            return None
        count, steps = self.session.restore(cache, prompt)
        self._gone = self._gone[self._gone >= count]
        self._saved = (count, self._now())
        return count, steps

    def began(self, cache: KVCache, reused: int, total: int) -> None:
        """A cache holds ``reused`` tokens of a prompt of ``total``: from now on it is what is saved."""
        self._cache = cache
        self.session.reused_tokens, self.session.computed_tokens = reused, total - reused

    def stepped(self, cache: KVCache, n_kv: int, sequence: Sequence[int], steps: Steps) -> None:
        """A step is done, and the cache holds ``n_kv`` tokens: prune again what was pruned, and save if it is time to."""
        if self._gone.size:
            cache.prune(self._gone[self._gone < n_kv])
            self._gone = self._gone[self._gone >= n_kv]
        every, seconds = self.options.checkpoint_tokens, self.options.checkpoint_seconds
        if (every and n_kv - self._saved[0] >= every) or (seconds and self._now() - self._saved[1] >= seconds):
            self.save(cache, n_kv, sequence, steps, whole=False)

    def save(self, cache: KVCache, n_kv: int, sequence: Sequence[int], steps: Steps, *, whole: bool) -> None:
        """Write a checkpoint of a sequence whose first ``n_kv`` tokens are in the cache; a failure is remembered, the run
        goes on.

        While a cache is not restored, or tokens are still to be pruned again, the last checkpoint stays: it says what was there.
        """
        if self._gone.size or cache is not self._cache:
            return
        self._saved = (n_kv, self._now())
        try:
            self.session.checkpoint(cache, sequence[:n_kv], sequence[n_kv:], steps, whole=whole)
            self.session.failure = None
        except StoreError as error:
            self.session.failure = str(error)

    def abandon(self) -> None:
        """Let the session go as the end of the process would."""
        self.session.abandon()

    def close(self) -> None:
        """Let the session go.

        Raises:
            StoreError: the last checkpoint could not be written.
        """
        self.session.close()
        if self.session.failure is not None:
            raise StoreError(f"the session was not saved: {self.session.failure}")


def with_prefix(
    keeper: SessionKeeper | None, path: Path, options: RunOptions, manifest: Manifest, machine: Machine = HOST
) -> SessionKeeper | None:
    """Let a sequence that begins now begin with a cached prefix, if that can be read; returns its keeper."""
    found = open_prefix(path, manifest)
    if found is None or keeper is None:
        return keeper if found is None else SessionKeeper(options, manifest, found, machine)
    try:
        with contextlib.suppress(StoreError):  # then the prompt is computed, and saving says what is wrong
            keeper.session.graft(found)
    finally:
        found.close()
    return keeper
