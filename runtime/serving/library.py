"""The library of a service: pages that requests left behind, on flash, for those that begin alike.

Every page is written once, whoever computed it, and stays until the library exceeds its limit; then what was not used for longest
goes. What is in it survives a restart and a kill: a page counts once its records and its row are durable.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from edgekv.bundle import Manifest
from edgekv.errors import SessionMismatch, StoreError, StoreLocked
from edgekv.files import make_own_folder
from edgekv.spec import PageSpec

from ..sessions.folder import bits_key, make_cipher, new_meta, take_lock
from ..storage.cipher import Cipher
from ..storage.medium import Medium
from ..storage.segments import SegmentStore
from ..storage.wear import WearLedger
from .rows import LibraryIndex, PageRow, TurnRow
from .tree import Found, Node, Tree, Turn

INDEX = "library.sqlite"
#: Evicted down to this share of the limit at a time, so that it is done seldom.
_EVICT_TO = 0.95
_log = logging.getLogger(__name__)


class Library:
    """The pages of one folder, for one bundle; one process has it open, and one thread uses it.

    Args:
        computed_by: see :func:`~edgekv.runtime.sessions.folder.bits_key`. chunk: at whose multiples prompts are cut into steps.
        exact: see :class:`~edgekv.runtime.serving.tree.Tree`.

    Attributes:
        store: the records; also of pages that a running sequence moved out of RAM and that are not in the tree yet.

    Raises (from the constructor):
        StoreLocked: another process has it open. StoreError: it cannot be used. SessionMismatch: it is encrypted and the key is
            missing or wrong. EngineMissing: no package for encryption.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        computed_by: str,
        *,
        chunk: int,
        exact: bool,
        limit_bytes: int,
        secret: bytes | None = None,
        medium: Medium | None = None,
        max_bytes_per_day: int | None = None,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.exact = exact
        self.spec: PageSpec = manifest.model.pages(manifest.page_size)
        self.tree = Tree(manifest.page_size, chunk, exact=exact)
        self.used_bytes = 0
        key = bits_key(manifest, computed_by)
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / name
        try:
            make_own_folder(folder)
            make_own_folder(self.folder)
        except OSError as error:
            raise StoreError(
                f"cannot use the cache folder {folder}: {error.strerror}; choose another --cache-dir"
            ) from error
        self._held = contextlib.ExitStack()
        try:
            self._held.callback(os.close, _take(self.folder))
            self._index = LibraryIndex(self.folder / INDEX)
            self._held.callback(self._index.close)
            cipher = self._meet(key, secret)
            self.store = SegmentStore(
                self.folder,
                self.spec,
                cipher,
                medium,
                WearLedger(self.folder, max_bytes_per_day, "or serve with --cache-limit 0"),
                name=f"the cache of requests {self.folder}",
                when_full="free some space, or choose another --cache-dir",
            )
            self._held.callback(self.store.close)
        except BaseException:
            self._held.close()
            raise
        self._number = 0
        self._owned: set[int] = set()
        self._added: dict[tuple[str, int], tuple[Node | Turn, bytes]] = {}
        self._gone: dict[tuple[str, int], Node | Turn] = {}
        self._touched: dict[tuple[str, int], Node | Turn] = {}
        self._since: float | None = None
        self._read()

    @property
    def encrypted(self) -> bool:
        """Whether it is ciphertext."""
        return self.store.cipher is not None

    def _meet(self, key: dict[str, str | int], secret: bytes | None) -> Cipher | None:
        meta = self._index.meta()
        if meta is None:
            meta, self._index.cipher = new_meta(key, self.spec, secret)
            self._index.begin(meta)
            return self._index.cipher
        if meta.encrypted != (secret is not None):
            raise SessionMismatch(
                f"the cache of requests {self.folder} is {'' if meta.encrypted else 'not '}encrypted: serve"
                f" {'with' if meta.encrypted else 'without'} --encrypt, or choose another --cache-dir"
            )
        cipher = make_cipher(meta, self.folder, secret)
        self._index.cipher = cipher
        return cipher

    def _read(self) -> None:
        """Put everything that is whole into the tree."""
        nodes: dict[int, Node] = {}
        records: dict[int, int] = {}
        for number, used, row in self._index.rows(PageRow):
            self._number = max(self._number, number)
            parent = nodes.get(row.parent) if row.parent else self.tree.root(row.owner)
            if parent is None or len(row.tokens) != self.spec.page_size or len(row.records) != self.spec.n_layers:
                continue
            node = nodes[number] = Node(number, parent, row.tokens, row.cuts, row.records, used)
            self.tree.add(node)
            records.update(zip(row.records, row.checks, strict=False))
        for number, used, turn in self._index.rows(TurnRow):
            self._number = max(self._number, number)
            where = nodes.get(turn.node) if turn.node else self.tree.root(turn.owner)
            if where is None or len(turn.records) not in (0, 2 * self.spec.n_layers):
                continue
            self.tree.add(Turn(number, where, turn.tokens, turn.n_kv, turn.cuts, turn.records, used))
            records.update(zip(turn.records, turn.checks, strict=False))
        self.store.adopt(records.keys(), records.values())
        self._owned = set(records)
        self.used_bytes = len(records) * self.spec.record_bytes
        self.tree.resume_clock()
        self.make_room(0)

    # -- what requests ask -----------------------------------------------------------------------------------------

    def find(self, owner: bytes, prompt: Sequence[int]) -> Found:
        """Return what of a prompt is kept."""
        return self.tree.find(owner, prompt)

    def use(self, found: Found) -> None:
        """Note that something is used now."""
        last = found.turn or (found.path[-1] if found.path else None)
        if last is not None:
            self._touch(last)

    def _touch(self, item: Node | Turn) -> None:
        self.tree.use(item)
        if _name(item) not in self._added:
            self._touched[_name(item)] = item
            self._mark()

    def make_room(self, n_records: int) -> bool:
        """Let the oldest go until so many more records fit the limit; says whether they do."""
        needed = n_records * self.spec.record_bytes
        if self.used_bytes + needed <= self.limit_bytes:
            return True
        if needed > self.limit_bytes:
            return False
        wanted = min(int(self.limit_bytes * _EVICT_TO), self.limit_bytes - needed)
        for item in self.tree.oldest():
            self.remove(item)
            if self.used_bytes <= wanted:
                break
        return self.used_bytes + needed <= self.limit_bytes

    def give_way(self, n_records: int) -> bool:
        """Let the oldest go until so many records are free to be overwritten, since the medium is full; says whether they are."""
        wanted = self.used_bytes - n_records * self.spec.record_bytes
        for item in self.tree.oldest():
            if self.used_bytes <= wanted:
                break
            self.remove(item)
        self.commit()  # what a commit refers to is never overwritten
        return self.used_bytes <= wanted and not self._gone

    def add_page(
        self, parent: Node, owner: bytes, tokens: tuple[int, ...], cuts: tuple[int, ...], records: tuple[int, ...]
    ) -> Node:
        """Keep a page whose records are written; they belong to the library from now on."""
        node = Node(self._next(), parent, tokens, cuts, records)
        self.tree.add(node)
        self._keep(node, owner, records)
        return node

    def add_turn(self, node: Node, owner: bytes, tokens: tuple[int, ...], n_kv: int, cuts: tuple[int, ...]) -> Turn:
        """Keep where an answer ended; one that is known is used again."""
        for turn in node.turns:
            if (turn.tokens, turn.n_kv, turn.cuts) == (tokens, n_kv, cuts):
                self._touch(turn)
                return turn
        turn = Turn(self._next(), node, tokens, n_kv, cuts)
        self.tree.add(turn)
        self._keep(turn, owner, ())
        return turn

    def add_open(self, turn: Turn, owner: bytes, records: tuple[int, ...]) -> None:
        """Keep the open page of a turn, whose records are written."""
        turn.records = records
        self._keep(turn, owner, records)

    def remove(self, item: Node | Turn) -> None:
        """Forget a page with all behind it, or a turn."""
        for gone in self.tree.remove(item):
            self.used_bytes -= len(gone.records) * self.spec.record_bytes
            self._touched.pop(_name(gone), None)
            self._added.pop(_name(gone), None)
            self._gone[_name(gone)] = gone
            if isinstance(gone, Turn) or not gone.held:
                self._free(gone)
        self._mark()

    def hold(self, node: Node) -> None:
        """A sequence in RAM has this page: its records stay."""
        node.held += 1

    def release(self, node: Node) -> None:
        """A sequence in RAM has this page no more."""
        node.held -= 1
        if node.gone and not node.held:
            self._free(node)

    def owns(self, record: int) -> bool:
        """Say whether a record is of the library, and not of a running sequence alone."""
        return record in self._owned

    def _free(self, item: Node | Turn) -> None:
        for record in item.records:
            self._owned.discard(record)
            self.store.free(record)

    def _keep(self, item: Node | Turn, owner: bytes, records: tuple[int, ...]) -> None:
        self.tree.use(item)
        self.used_bytes += len(records) * self.spec.record_bytes
        self._owned.update(records)
        self._added[_name(item)] = item, owner
        self._mark()

    def _next(self) -> int:
        self._number += 1
        return self._number

    def check(self) -> None:
        """Assert that what is kept is accounted for."""
        items = [item for item, _ in self.tree.items()]
        records = [record for item in items for record in item.records]
        assert len(records) == len(set(records)), "a record belongs to two"
        assert self._owned >= set(records)
        assert self.used_bytes == len(records) * self.spec.record_bytes
        assert self.tree.size == len(items)

    # -- durability ------------------------------------------------------------------------------------------------

    def _mark(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    @property
    def waits_s(self) -> float | None:
        """For how many seconds a change has not been durable; None: there is none."""
        return None if self._since is None else time.monotonic() - self._since

    def commit(self) -> None:
        """Make all changes durable. A failure is told in the log, and tried again with the next changes."""
        if self._since is None:
            return
        check = self.store.check_of
        added = [
            (item.number, item.used, _row(item, owner, tuple(map(check, item.records))))
            for item, owner in self._added.values()
        ]
        used = [(*name, item.used) for name, item in self._touched.items()]
        try:
            self.store.sync()
            self._index.commit(added, self._gone, used)
        except StoreError as error:
            _log.warning("what requests left is not kept: %s", error)
            self._since = None
            return
        self.store.changed(
            (record for item, _ in self._added.values() for record in item.records),
            (record for item in self._gone.values() for record in item.records),
        )
        self._added, self._gone, self._touched, self._since = {}, {}, {}, None

    def close(self) -> None:
        """Make all changes durable and let other processes in."""
        try:
            self.commit()
            if not (self._added or self._gone):
                self.store.trim()
        finally:
            self._held.close()


def _take(folder: Path) -> int:
    try:
        lock = take_lock(folder)
    except StoreLocked as error:
        raise StoreLocked(f"another server has the cache folder {folder} open; choose another --cache-dir") from error
    if lock is None:
        raise StoreError(f"the cache folder {folder} cannot be written; choose another --cache-dir")
    return lock


def _name(item: Node | Turn) -> tuple[str, int]:
    return ("turn" if isinstance(item, Turn) else "page"), item.number


def _row(item: Node | Turn, owner: bytes, checks: tuple[int, ...]) -> PageRow | TurnRow:
    if isinstance(item, Turn):
        return TurnRow(item.node.number, owner, item.tokens, item.n_kv, item.cuts, item.records, checks)
    assert item.parent is not None
    return PageRow(item.parent.number, owner, item.tokens, item.cuts, item.records, checks)
