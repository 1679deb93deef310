"""A session: the tokens of a sequence and their keys and values, kept across runs in a folder.

A checkpoint writes only what is new (sealed pages, each once; pages that went to flash for lack of RAM are written
already), makes it durable, and then commits the index. A run that starts again restores the longest common prefix of its
prompt and the session. Whatever is damaged is found by a checksum and never attended to; what is before it is used.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgekv.bundle import Manifest
from edgekv.errors import SessionError, StoreError, UsageError
from edgekv.files import make_folder
from edgekv.scratch import HIDDEN, ScratchFolder
from edgekv.spec import RECORD_HEADER_BYTES
from edgekv.tiers import Tier

from ..options import SessionOptions
from ..pages.cache import KVCache
from ..pages.manager import tag
from ..storage.cipher import Cipher
from ..storage.medium import Medium
from ..storage.segments import SegmentStore, segment_paths, sync_folder
from ..storage.wear import WearLedger
from ..system.buffers import aligned_rows
from ..system.lifetime import when_gone
from .folder import (
    check_key,
    is_session,
    make_cipher,
    make_session,
    open_index,
    read_state,
    session_key,
    share_segments,
    signals_held,
    take_lock,
    unmake_session,
    write_backup,
)
from .index import FORMAT, INDEX, Meta, Row, SessionIndex, State, Tail, chain, from_ranges, to_ranges
from .restore import (
    Restored,
    check_unseen,
    common_prefix,
    open_tags,
    records_of,
    restore_open,
    restore_pages,
    store_open,
)
from .steps import Steps

Part = TypeVar("Part", Row, Tail)
_WHEN_USED_UP = "or run without --session"


@dataclass
class _Held:
    """What a session holds open; ``index`` and ``lock`` where it can be written."""

    store: SegmentStore
    index: SessionIndex | None
    lock: int | None

    def close(self) -> None:
        if self.index is not None:
            self.index.close()
        self.store.close()
        if self.lock is not None:
            os.close(self.lock)


class Session:
    """One session, open. Not safe for use from several threads.

    Attributes:
        read_only: why nothing is saved, or None.
        failure: why the last checkpoint could not be written, or None.
        problems: damage that was found; everything that is used is whole.
        notes: plain data that is saved along, such as the messages of a conversation.
        reused_tokens, computed_tokens, discarded_tokens: of the last prompt: what was restored, what had to be computed,
            what the session held after the place where the prompt differs from it.
    """

    def __init__(
        self,
        path: Path,
        state: State,
        store: SegmentStore,
        index: SessionIndex | None,
        lock: int | None,
        read_only: str | None,
    ) -> None:
        self.path = path
        self.read_only = read_only
        self.failure: str | None = None
        self.problems = state.problems
        self.notes: dict[str, Any] = state.notes
        self.reused_tokens = self.computed_tokens = self.discarded_tokens = 0
        self.checkpoints = 0
        self._is_new = False
        assert state.meta is not None
        self._state = state
        #: What the next checkpoint says the session is.
        self._meta: Meta = state.meta
        self._held = _Held(store, index, lock)
        self._forgotten = when_gone(self, self._held.close)
        self._spec = store.spec
        #: The committed rows that the cache holds; those of ``_state`` are what the index holds.
        self._rows: list[Row] = []

    @classmethod
    def open(
        cls, options: SessionOptions, manifest: Manifest | None, *, save: bool = True, medium: Medium | None = None
    ) -> Session:
        """Open a session, or start one.

        Args:
            manifest: of the bundle that it must fit; None opens an existing session whatever it was made with.
            save: False reads it without a lock and never writes beside it.

        Raises:
            StoreLocked: another process has it. SessionMismatch: it was made with something else; the message says with
                what. UsageError: the path is no session. SessionError, StoreError: it cannot be read.
        """
        path, is_new = options.path, False
        if manifest is None or not save:
            if not is_session(path):
                raise UsageError(f"{path} is not a session; edgekv sessions list DIR shows those of a folder")
        else:
            is_new = make_session(path)
        lock = take_lock(path) if save else None
        index: SessionIndex | None = None
        try:
            read_only = None if lock is not None else "its files cannot be written"
            if lock is not None:
                state, index = open_index(path, manifest, options.secret)
            else:
                state = read_state(path, options.secret)
            if not state.meta:
                raise SessionError(
                    f"the index of the session {path} is damaged beyond use ({'; '.join(state.problems[:2])}); nothing was"
                    " deleted. Start a new session under another name"
                )
            if manifest is not None:
                check_key(path, state.meta, manifest)
            cipher = index.cipher if index is not None else make_cipher(state.meta, path, options.secret)
            store = SegmentStore(
                path,
                state.meta.pages,
                cipher,
                medium,
                WearLedger(path, options.max_bytes_per_day, _WHEN_USED_UP) if lock is not None else None,
                write=lock is not None,
            )
        except BaseException:
            if index is not None:
                index.close()
            if is_new:
                unmake_session(path)
            if lock is not None:
                os.close(lock)
            raise
        session = cls(path, state, store, index, lock, read_only)
        session._is_new = is_new
        if manifest is not None and state.meta.format < FORMAT:
            session._meta = replace(state.meta, format=FORMAT, key=session_key(manifest))
        session._adopt()
        return session

    # -- what it holds -----------------------------------------------------------------------------------------

    @property
    def store(self) -> SegmentStore:
        """The records."""
        return self._held.store

    @property
    def tokens(self) -> list[int]:
        """All tokens of the last checkpoint."""
        return [token for row in self._state.rows for token in row.tokens] + list(self._state.tail.tokens)

    @property
    def state(self) -> State:
        """What the last checkpoint holds."""
        return self._state

    @property
    def steps(self) -> Steps:
        """In which steps the tokens with keys and values were computed."""
        tail, size = self._state.tail, self._spec.page_size
        steps = Steps.of_lengths(size, tail.steps)
        if steps.end < self._n_kv:  # an older session, or a damaged one: pages are all that is known
            return Steps(size, sorted({*range(0, self._n_kv, size), *tail.starts} - {self._n_kv}), self._n_kv)
        return steps

    @property
    def _version(self) -> int:
        """The format of what the last checkpoint holds."""
        assert self._state.meta is not None
        return self._state.meta.format

    @property
    def _n_kv(self) -> int:
        """How many tokens have keys and values."""
        tail = self._state.tail
        return tail.n_kv or len(self._state.rows) * self._spec.page_size

    def restore(self, cache: KVCache, prompt: Sequence[int]) -> Restored:
        """Fill an empty cache with what the session and a prompt begin with alike, all but the prompt's last token.

        Raises:
            StoreError: the medium refused.
        """
        state, size, n_kv, steps = self._state, self._spec.page_size, self._n_kv, self.steps
        held, sealed = self.tokens, len(state.rows) * size
        common, wanted = common_prefix(held, prompt), len(prompt) - 1
        if common < steps.end:
            steps.cut(steps.keep(common))
        pruned = from_ranges(state.tail.pruned)
        stored = state.tail.records or np.isin(np.arange(sealed, min(n_kv, steps.end)), pruned).all()
        count = steps.keep(min(wanted, n_kv), n_kv) if stored else steps.keep(min(wanted, sealed), -1)
        whole = min(count // size, len(state.rows))
        restored = restore_pages(cache, state.rows[:whole], self.store)
        damaged = ""
        if restored < whole:
            damaged, count = f"page {restored}", steps.keep(restored * size, -1)
        elif count > sealed and not restore_open(cache, count, state.tail.records, self.store, self._version):
            damaged, count = "the open page", steps.keep(sealed, -1)
        if damaged:
            behind = check_unseen(cache, state.rows[: count // size], whole, self.store)
            if behind < count // size:
                damaged, count = f"page {behind}", steps.keep(behind * size, -1)
            self.problems.append(f"{damaged} is damaged or missing; the tokens from {count} on are computed again")
        cache.truncate(count)
        cache.prune(pruned[pruned < count])
        for record in (record for row in state.rows[restored:] for record in row.records):
            self.store.free(record)
        self._rows = state.rows[: count // size]
        self.discarded_tokens = len(held) - common
        return Restored(count, steps, pruned[(pruned >= count) & (pruned < common)])

    # -- saving ------------------------------------------------------------------------------------------------

    def checkpoint(
        self,
        cache: KVCache,
        tokens: Sequence[int],
        pending: Sequence[int],
        steps: Steps,
        gone: Sequence[int] = (),
        *,
        whole: bool,
    ) -> bool:
        """Save what is new.

        Args:
            tokens: whose keys and values the cache holds. pending: tokens after them, without any yet.
            steps: in which they were computed, and pending ones will be.
            gone: positions of pending tokens that are to be pruned once they are computed.
            whole: store the open page too, so that resuming computes nothing again. Without it the tokens of the last steps
                that reach into it are, to the same bits; one that has pruned tokens is always stored.

        Returns:
            False when the session is read-only.

        Raises:
            StoreFull, StoreError, SessionError: not saved; the last checkpoint stands, and the cache is as it was.
        """
        if self.read_only:
            return False
        assert self._held.index is not None
        with signals_held():
            size, table = self._spec.page_size, cache.table
            sealed = len(tokens) // size
            kept = 0
            for kept_row in self._rows[:sealed]:
                if records_of(cache, kept) != kept_row.records:
                    break
                kept += 1
            layers = range(self._spec.n_layers)
            missing = [(layer, page) for page in range(kept, sealed) for layer in layers]
            cache.manager.persist([page for page in missing if table.tier[page] != Tier.FREE])
            pruned = [token for token in cache.pruned().tolist() if token < len(tokens)]
            whole = whole or bool(pruned and pruned[-1] >= sealed * size)
            rows = self._rows[:kept]
            for page in range(kept, sealed):
                records = records_of(cache, page)
                content = tuple(tokens[page * size : page * size + size])
                checks = tuple(map(self.store.check_of, records))
                rows.append(Row(content, records, checks, chain(rows[-1].chain if rows else b"", content)))
            opened = (
                store_open(cache, len(tokens), self.store, self._meta.format) if whole and len(tokens) % size else []
            )
            tail = Tail(
                sealed,
                (*tokens[sealed * size :], *pending),
                len(tokens),
                records=tuple(opened),
                checks=tuple(map(self.store.check_of, opened)),
                chain=rows[-1].chain.hex() if rows else "",
                pruned=to_ranges(sorted({*pruned, *gone})),
                steps=steps.lengths(),
            )
            state = State(self._meta, self.notes, rows, tail)
            try:
                self.store.sync()
                self._held.index.commit(state, kept, len(self._state.rows))
            except StoreError:
                for record in opened:
                    self.store.free(record)
                raise
            for record in self._state.tail.records:
                self.store.free(record)
            self._state, self._rows = state, rows
            self.store.committed([r for row in rows for r in row.records] + opened)
            self.checkpoints += 1
        return True

    def save_notes(self) -> None:
        """Write the notes into the last checkpoint, if there is one; its tokens and pages stay.

        Raises:
            SessionError: not saved; the last checkpoint stands.
        """
        state = self._state
        if self.read_only or not (state.rows or state.tail.tokens):
            return
        assert self._held.index is not None
        with signals_held():
            state = replace(state, meta=self._meta, notes=self.notes)
            self._held.index.commit(state, len(state.rows), len(state.rows))
            self._state = state

    def fork(self, path: Path) -> bool:
        """Make another session that begins as the last checkpoint of this one.

        Returns:
            whether the two share their pages; else no hard link could be made there, and they were copied.

        Raises:
            UsageError: ``path`` exists. SessionError: it cannot be written.
        """
        if path.exists():
            raise UsageError(f"{path} exists already; choose another name for the fork")
        try:
            make_folder(path.parent)
            with ScratchFolder(path.parent, HIDDEN) as scratch:
                made = scratch.path / path.name
                made.mkdir(mode=0o700)
                shared = share_segments(self.path, made)
                index = SessionIndex(made / INDEX, create=True)
                assert self._state.meta is not None
                index.begin(replace(self._state.meta, created=time.time()))
                index.cipher = self._cipher
                index.commit(self._state, 0, 0)
                index.close()
                sync_folder(made)
                os.rename(made, path)
                sync_folder(path.parent)
        except OSError as error:
            raise SessionError(f"cannot make the session {path}: {error.strerror}") from error
        return shared

    def rewrite(self) -> None:
        """Write all records that are in use, in order, into one new file, commit, and remove the old files.

        Raises:
            CorruptPage: a record is damaged. StoreFull, StoreError: not written. In each case nothing changed.
        """
        assert self._held.index is not None
        old = segment_paths(self.path)
        self.store.retire()
        rows = []
        for page, row in enumerate(self._state.rows):
            rows.append(self._moved(row, [tag(layer, page) for layer in range(len(row.records))]))
        tail = self._state.tail
        if tail.records:
            tail = self._moved(tail, open_tags(self._spec.n_layers, tail.n_pages, self._version))
        state = State(self._state.meta, self.notes, rows, tail)
        self.store.sync()
        self._held.index.commit(state, 0, len(rows))
        self._state = state
        self._adopt()
        self.store.forget(old)
        self.checkpoints += 1

    def _moved(self, part: Part, tags: list[int]) -> Part:
        """Write the records of a page again; returns the row or tail with their new numbers."""
        out = aligned_rows(len(tags), self._spec.record_bytes)
        self.store.read(list(part.records), tags, out)
        stop = RECORD_HEADER_BYTES + self._spec.warm_bytes
        records = self.store.write(tags, [row[RECORD_HEADER_BYTES:stop] for row in out])
        return replace(part, records=tuple(records), checks=tuple(map(self.store.check_of, records)))

    def graft(self, other: Session) -> None:
        """Begin an empty session with the pages of another one of the same checkpoint, shared.

        Raises:
            SessionError, StoreError: they cannot be shared; this session stays empty.
        """
        assert self._held.index is not None
        if self._state.rows or segment_paths(self.path) or self._cipher is not None or other._cipher is not None:
            return
        try:
            share_segments(other.path, self.path, self.store.wear)
        except OSError as error:
            raise SessionError(f"cannot make the session {self.path}: {error.strerror}") from error
        self.store.open_segments()
        sealed = len(other._state.rows) * self._spec.page_size
        tail = replace(other._state.tail, tokens=(), n_kv=sealed, records=(), checks=())
        state = State(self._state.meta, self.notes, list(other._state.rows), tail)
        self._held.index.commit(state, 0, 0)
        self._state = state
        self._adopt()

    def abandon(self) -> None:
        """Let go as a process does that is killed: nothing is written, and nothing tidied up. So does one that is forgotten."""
        self._forgotten()

    def close(self) -> None:
        """Close the files and let other processes in; what was not saved is gone, and so is a new session that holds nothing."""
        index = self._held.index
        try:
            if self._forgotten.alive and index is not None:
                saved = self.checkpoints > 0
                if saved and not self.read_only:
                    self.store.trim()
                    index.fold()
                index.close()
                if saved:
                    write_backup(self.path)
                elif self._is_new:
                    unmake_session(self.path)
        finally:
            self._forgotten()

    @property
    def encrypted(self) -> bool:
        """Whether tokens, keys and values are ciphertext."""
        return self._cipher is not None

    @property
    def _cipher(self) -> Cipher | None:
        return self.store.cipher

    def _adopt(self) -> None:
        parts: list[Row | Tail] = [*self._state.rows, self._state.tail]
        self.store.adopt([r for part in parts for r in part.records], [c for part in parts for c in part.checks])
