"""Between a generator and its session: when to save, and what to restore."""

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
from .sessions.prefixes import open_prefix
from .sessions.restore import Restored
from .sessions.session import Session
from .sessions.steps import Steps
from .storage.interface import Kept

Int = NDArray[np.int64]


class Keeper(Protocol):
    """Keeps the sequences of one generator beyond its cache. Methods: see :class:`SessionKeeper`."""

    @property
    def kept(self) -> Kept:
        """Where pages are kept."""
        ...

    def restore(self, cache: KVCache, prompt: Sequence[int]) -> Restored | None:
        """Bring what is kept of a prompt into the cache; None: what is in it stays."""
        ...

    def began(self, cache: KVCache, reused: int, total: int) -> None:
        """A prompt begins."""
        ...

    def stepped(self, cache: KVCache, n_kv: int, sequence: Sequence[int], steps: Steps, gone: Int) -> None:
        """A step is done."""
        ...

    def save(self, cache: KVCache, n_kv: int, sequence: Sequence[int], steps: Steps, gone: Int, *, whole: bool) -> None:
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
        self._saved = (0, self._now())

    @property
    def kept(self) -> Session:
        """The session."""
        return self.session

    def restore(self, cache: KVCache, prompt: Sequence[int]) -> Restored | None:
        """Fill a new cache from the session; None, with nothing restored, where the cache is in use.

        Raises:
            StoreError: the medium refused.
        """
        if cache is self._cache:
            return None
        restored = self.session.restore(cache, prompt)
        self._saved = (restored.count, self._now())
        return restored

    def began(self, cache: KVCache, reused: int, total: int) -> None:
        """A cache holds ``reused`` tokens of a prompt of ``total``: from now on it is what is saved."""
        self._cache = cache
        self.session.reused_tokens, self.session.computed_tokens = reused, total - reused

    def stepped(self, cache: KVCache, n_kv: int, sequence: Sequence[int], steps: Steps, gone: Int) -> None:
        """A step is done, and the cache holds ``n_kv`` tokens: save if it is time to."""
        every, seconds = self.options.checkpoint_tokens, self.options.checkpoint_seconds
        if (every and n_kv - self._saved[0] >= every) or (seconds and self._now() - self._saved[1] >= seconds):
            self.save(cache, n_kv, sequence, steps, gone, whole=False)

    def save(self, cache: KVCache, n_kv: int, sequence: Sequence[int], steps: Steps, gone: Int, *, whole: bool) -> None:
        """Write a checkpoint of a sequence whose first ``n_kv`` tokens are in the cache; a failure is remembered, the run
        goes on.

        While a cache is not restored, the last checkpoint stays: it says what was there.

        Args:
            gone: which positions behind ``n_kv`` are to be pruned again when they are computed.
        """
        if cache is not self._cache:
            return
        self._saved = (n_kv, self._now())
        try:
            self.session.checkpoint(cache, sequence[:n_kv], sequence[n_kv:], steps, gone.tolist(), whole=whole)
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
