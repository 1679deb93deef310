"""Between a generator that serves and the library: what its next prompt goes on from, and what its sequence leaves behind."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from edgekv.errors import StoreError, StoreFull, WriteLimit
from edgekv.spec import PageSpec
from edgekv.tiers import Tier

from ..kernels.interface import RecordStreams
from ..pages.cache import KVCache
from ..pages.table import NOTHING, Int
from ..sessions.index import FORMAT, Row
from ..sessions.restore import (
    Restored,
    check_unseen,
    common_prefix,
    records_of,
    restore_open,
    restore_pages,
    store_open,
)
from ..sessions.steps import Steps
from ..storage.interface import Bytes, Landing, StoreCounters
from ..storage.record import Wanted
from .library import Library
from .tree import Found, Node, Turn

_log = logging.getLogger(__name__)


class LibraryKeeper:
    """Keeps the sequences of one generator in a library; it is the generator's :class:`~edgekv.runtime.keeper.Keeper`."""

    read_only: str | None = None

    def __init__(self, library: Library) -> None:
        self._library = library
        self._spec: PageSpec = library.spec
        self.store = _Shelf(library)
        self._owner = b""  #: of the sequence in the cache
        self._next_owner = b""
        self._cache: KVCache | None = None
        self._sequence: list[int] = []  #: as it was saved last
        self._steps = Steps(self._spec.page_size)
        self._path: list[Node] = []  #: of the pages in the cache, those that the library has
        self._turn: Turn | None = None  #: the one that the sequence ends with

    @property
    def kept(self) -> LibraryKeeper:
        """Itself: its store is where pages are."""
        return self

    @property
    def encrypted(self) -> bool:
        """Whether what is kept is ciphertext."""
        return self._library.encrypted

    def ask(self, owner: bytes) -> None:
        """Say whose the next prompt is."""
        self._next_owner = owner

    def reuse(self, owner: bytes, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt are in the cache, and may be gone on from."""
        if self._cache is None or owner != self._owner:
            return 0
        held = int(self._cache.table.n_slots[0])
        if self._goes_on(prompt):
            return held
        common = common_prefix(self._sequence, prompt)
        return self._library.tree.fresh_count(self._steps, held, common, len(prompt) - 1)

    def _goes_on(self, prompt: Sequence[int]) -> bool:
        whole = self._sequence
        return self._turn is not None and not self._library.exact and list(prompt[: len(whole)]) == whole

    def restore(self, cache: KVCache, prompt: Sequence[int]) -> Restored | None:
        """Let the cache hold what may be gone on from: what is in it, or what the library has, if that is more.

        Raises:
            StoreError: the medium refused.
        """
        owner, library = self._next_owner, self._library
        in_ram, found = self.reuse(owner, prompt), library.find(owner, prompt)
        if in_ram >= found.count and in_ram:
            if self._goes_on(prompt):
                return None
            count, steps = self._cut(in_ram)
        else:
            self.leave()  # which makes room in the library, and what was found may be what goes
            self._cache, self._owner = cache, owner
            count, steps = self._take(library.find(owner, prompt), len(prompt) - 1)
        self._sequence, self._steps = list(prompt[:count]), steps
        return Restored(count, steps, np.empty(0, np.int64))

    def _cut(self, count: int) -> tuple[int, Steps]:
        """Keep the first tokens in the cache, which a fresh run computes alike."""
        assert self._cache is not None
        self._cache.truncate(count)
        self._let_go(count // self._spec.page_size)
        return count, self._library.tree.steps_of(Found(count))

    def _take(self, found: Found, wanted: int) -> tuple[int, Steps]:
        """Fill the cache from the library; as :meth:`Session.restore`, with whose words what is damaged is told."""
        cache, library, size = self._cache, self._library, self._spec.page_size
        assert cache is not None
        cache.truncate(0)
        self._let_go(0)
        if not found.count:
            return 0, Steps(size)
        library.use(found)
        steps, path, turn = library.tree.steps_of(found), list(found.path), found.turn
        sealed = len(path) * size
        stored = found.count == sealed or bool(turn and turn.records)
        count = steps.keep(min(wanted, found.count), found.count) if stored else steps.keep(min(wanted, sealed), -1)
        whole = min(count // size, len(path))
        rows = [Row(node.tokens, node.records, (), b"") for node in path[:whole]]
        for node in path[:whole]:
            library.hold(node)
        self._path = path[:whole]
        restored = restore_pages(cache, rows, self.store)
        damaged: Node | Turn | None = None
        if restored < whole:
            damaged, count = path[restored], steps.keep(restored * size, -1)
        elif count > sealed and not (turn and restore_open(cache, count, turn.records, library.store, FORMAT)):
            damaged, count = turn, steps.keep(sealed, -1)
        if damaged is not None:
            behind = check_unseen(cache, rows[: count // size], whole, self.store)
            if behind < count // size:
                damaged, count = path[behind], steps.keep(behind * size, -1)
            _log.warning("a page of %s is damaged; the tokens from %d on are computed again", library.folder, count)
            library.remove(damaged)
        cache.truncate(count)
        self._let_go(count // size)
        return count, steps

    def _let_go(self, n_pages: int) -> None:
        """Hold the first pages of the path alone; the others are not in the cache any more, so that their records may go."""
        for node in self._path[n_pages:]:
            self._library.release(node)
        del self._path[n_pages:]

    def began(self, cache: KVCache, reused: int, total: int) -> None:
        """A prompt begins: the sequence is not a turn until its answer is over."""
        self._turn = None

    def stepped(self, cache: KVCache, n_kv: int, sequence: Sequence[int], steps: Steps, gone: Int) -> None:
        """A step is done: nothing is kept before its time."""

    def save(self, cache: KVCache, n_kv: int, sequence: Sequence[int], steps: Steps, gone: Int, *, whole: bool) -> None:
        """Keep the sealed pages of the sequence; a failure is told in the log, and the sequence goes on.

        While a cache is not restored there is nothing to keep.
        """
        if cache is not self._cache:
            return
        self._sequence, self._steps = list(sequence), steps
        try:
            self._save_pages(cache, n_kv)
        except StoreError as error:
            _log.warning("what a request left is not kept: %s", error)

    def _save_pages(self, cache: KVCache, n_kv: int) -> None:
        library, size, manager = self._library, self._spec.page_size, cache.manager
        pages = [self._key(page) for page in range(n_kv // size)]
        same = 0
        for node, key in zip(self._path, pages, strict=False):
            if node.gone:  # damage was found in it; its records stay as long as this cache has it
                return
            if (node.tokens, node.cuts) != key:
                break
            same += 1
        self._let_go(same)
        parent = self._path[-1] if self._path else library.tree.root(self._owner)
        for page in range(same, len(pages)):  # what others computed alike is not written again
            known = library.tree.child(parent, *pages[page])
            if known is None:
                break
            for layer, record in enumerate(known.records):
                if cache.table.record[layer, page] == NOTHING:
                    manager.share(layer, page, record)
            library.hold(known)
            self._path.append(known)
            parent = known
        new = range(len(self._path), len(pages))
        if not new or not library.make_room(len(new) * self._spec.n_layers):
            return
        manager.persist([(layer, page) for page in new for layer in range(self._spec.n_layers)])
        for page in new:
            parent = library.add_page(parent, self._owner, *pages[page], records_of(cache, page))
            library.hold(parent)
            self._path.append(parent)

    def _key(self, page: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        start, stop = page * self._spec.page_size, (page + 1) * self._spec.page_size
        return tuple(self._sequence[start:stop]), self._steps.cuts(start, stop)

    def end_turn(self) -> None:
        """The sequence, as it was saved last, is a prompt and its whole answer: a later prompt may go on from its end."""
        cache, size = self._cache, self._spec.page_size
        if cache is None:
            return
        n_kv = int(cache.table.n_slots[0])
        node = self._path[-1] if self._path else self._library.tree.root(self._owner)
        tokens = tuple(self._sequence[len(self._path) * size :])
        cuts = self._steps.cuts(n_kv // size * size, n_kv) if n_kv % size else ()
        if len(self._path) == n_kv // size and not node.gone:
            self._turn = self._library.add_turn(node, self._owner, tokens, n_kv, cuts)
        else:  # its pages are not kept: it is gone on from while it is in RAM
            self._turn = Turn(0, node, tokens, n_kv, cuts, gone=True)

    def leave(self) -> None:
        """Another sequence comes into the cache: what the library lacks of this one, its open page, is kept too."""
        cache, turn, library = self._cache, self._turn, self._library
        if cache is not None and turn is not None and not (turn.gone or turn.records):
            page, inside = divmod(turn.n_kv, self._spec.page_size)
            here = inside and int(cache.table.n_slots[0]) == turn.n_kv and (cache.table.tier[:, page] == Tier.HOT).all()
            if here and library.make_room(2 * self._spec.n_layers) and not turn.gone:
                try:
                    records = store_open(cache, turn.n_kv, library.store, FORMAT)
                    library.add_open(turn, self._owner, tuple(records))
                except StoreError as error:
                    _log.warning("what a request left is not kept: %s", error)
        self._turn = self._cache = None
        self._sequence = []

    def abandon(self) -> None:
        """Let go as the end of the process would."""

    def close(self) -> None:
        """Let go; the library belongs to the service."""


class _Shelf:
    """The store of one sequence: the library's records, of which it frees those that are its own alone."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._store = library.store

    @property
    def counters(self) -> StoreCounters:
        """What all sequences have done so far."""
        return self._store.counters

    @property
    def freed(self) -> int:
        """How often records became free to be overwritten, of any sequence."""
        return self._store.freed

    def write(self, tags: list[int], pages: list[Bytes]) -> list[int]:
        """Store pages, in one batch, and return their record indices; on a full medium what was not used for longest makes room.

        Raises:
            StoreFull, StoreError: see :meth:`SegmentStore.write`.
        """
        try:
            return self._store.write(tags, pages)
        except WriteLimit:
            raise
        except StoreFull:
            if not self._library.give_way(len(pages)):
                raise
            return self._store.write(tags, pages)

    def read(self, records: list[int], tags: list[int], out: Bytes) -> None:
        """Read records into out [n, record_bytes] uint8, checked; from any thread."""
        self._store.read(records, tags, out)

    def try_read(self, records: list[int], tags: list[int], out: Bytes) -> list[bool]:
        """Read records into ``out`` and return for each row whether it may be used."""
        return self._store.try_read(records, tags, out)

    def start(self, wanted: Wanted, out: Bytes) -> Landing:
        """Start to read, and return what waits for the end and raises what ``read`` would."""
        return self._store.start(wanted, out)

    def walk(self, rows: Bytes, capacity: int, n_layers: int) -> RecordStreams | None:
        """None, as for every store with an index."""
        return self._store.walk(rows, capacity, n_layers)

    def free(self, record: int) -> None:
        """Let a record be overwritten, unless it is the library's."""
        if not self._library.owns(record):
            self._store.free(record)

    def tier(self, record: int) -> int:
        """Return COLD: everything here is on flash."""
        return self._store.tier(record)

    def close(self) -> None:
        """Nothing: the library belongs to the service."""
