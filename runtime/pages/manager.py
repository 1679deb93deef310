"""The page manager: the only place where a page changes its tier.

Pages are born HOT, are quantised once when they are sealed (at once, or under pressure), go to flash when RAM runs
out, and are freed in every tier when their last token is pruned. A sealed page is immutable, so a page that is already on
flash leaves RAM without a write, and a page that came back is bit-identical.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import BudgetError, OutOfPages, WriteLimit
from edgekv.sizes import format_bytes
from edgekv.spec import RECORD_HEADER_BYTES, PageSpec
from edgekv.tiers import Tier

from ..kernels.interface import KIND_HOT, KIND_WARM, Kernels
from ..storage.interface import PageStore
from .arena import Arena
from .bounds import Summaries
from .counters import CacheStats
from .policy import CacheOptions, candidates, pairs
from .table import NOTHING, UNSETTLED, PageTable, offloaded

Bytes = NDArray[np.uint8]

#: A batch of writes to flash is this large when so many pages are ready: pages of a layer that lie side by side are
#: read back in one request. Source: a microSD card writes 22 MB/s at 1 MiB, 2.65 MB/s at 4 KiB (docs/profiles.md); pages
#: that were written in batches of 4 MiB come back a tenth faster than in batches of 1 MiB (benchmarks/flash/streaming.py).
WRITE_BATCH_BYTES = 4 * 1024 * 1024


class PageManager:
    """Moves the pages of one :class:`PageTable` between the tiers, inside a budget.

    Invariants (:mod:`edgekv.runtime.pages.invariants`):
    the arena never exceeds its budget; a page is in exactly one tier; HOT and WARM pages own
    exactly the arena room that their ``offset`` names; a COLD or REMOTE page has a record.

    Raises (from the constructor):
        BudgetError: the budget cannot hold one open page per layer and one to work with.
    """

    def __init__(
        self,
        spec: PageSpec,
        table: PageTable,
        options: CacheOptions,
        kernels: Kernels,
        store: PageStore | None,
        arena: type[Arena] = Arena,
    ) -> None:
        self.spec = spec
        self.table = table
        self.options = options
        self.kernels = kernels
        self.store = store
        needed = self.least_bytes(spec)
        if options.budget_bytes < needed:
            raise BudgetError(
                f"a KV budget of {format_bytes(options.budget_bytes)} is too small: {spec.n_layers} layers need one open page"
                f" each and one to work with, {format_bytes(needed)} in all; raise it (--kv-budget,"
                " max_memory_mb), or make smaller pages (--page-size at export, page_size)"
            )
        self.arena = arena(spec, options.budget_bytes)
        self.counters = CacheStats()
        self.step = 0
        #: Kept for selective attention, if that was chosen.
        self.summaries: Summaries | None = None
        self._scratch = np.empty(spec.warm_bytes, np.uint8)

    @staticmethod
    def least_bytes(spec: PageSpec, pinned: int = 0) -> int:
        """Smallest budget that a cache of this shape can work in, with so many sealed pages of a layer that never leave RAM."""
        return (spec.n_layers + 1 + (spec.n_layers * pinned + 1) // 2) * spec.frame_bytes

    def open_page(self, layer: int, page: int) -> None:
        """Take a frame for a page that is to be written. The caller has made room."""
        table = self.table
        offset = self.arena.take_frame()
        # Slots that are skipped (their tokens were pruned) must not bring old bytes into the scales.
        self.arena.page(offset, self.spec.hot_bytes)[:] = 0
        table.tier[layer, page] = Tier.HOT
        table.offset[layer, page] = offset
        table.last_used[layer, page] = self.step
        table.mass[layer, page] = 0
        table.content[layer, page] = UNSETTLED
        ref = table.refs[layer, page]
        ref["data"] = self.arena.address + offset
        ref["position"] = page * self.spec.page_size
        ref["kind"] = KIND_HOT
        ref["mask"] = 0
        first = page * self.spec.page_size
        table.arrived[layer, first : first + self.spec.page_size] = NOTHING
        self._forget(layer, page)

    def bring(self, layer: int, pages: list[int], rows: Sequence[Bytes] | None = None) -> None:
        """Bring COLD and REMOTE pages of a layer back to RAM: they are read, unless they were, and admitted.

        The caller has made room: by :meth:`make_room`, :meth:`room_for` or within :meth:`spare_room`.

        Args:
            rows: the records of the pages [record_bytes] uint8, checked, from who has read them already.

        Raises:
            CorruptPage, StoreError: a page cannot be read; none was admitted.
        """
        for page, row in zip(pages, self.read(layer, pages) if rows is None else rows, strict=True):
            self._place_warm(layer, page, row[RECORD_HEADER_BYTES:])

    def read(self, layer: int, pages: list[int]) -> Bytes:
        """Read COLD and REMOTE pages of a layer: their records [n, record_bytes] uint8, checked; residency does not change.

        Raises:
            CorruptPage, StoreError: a page cannot be read.
        """
        assert self.store is not None
        rows = np.empty((len(pages), self.spec.record_bytes), np.uint8)
        records = [int(self.table.record[layer, page]) for page in pages]
        self.store.read(records, [tag(layer, page) for page in pages], rows)
        self.counters.pages_fetched += len(pages)
        return rows

    def _place_warm(self, layer: int, page: int, payload: Bytes) -> None:
        table = self.table
        offset = self.arena.take_half()
        self.arena.page(offset, self.spec.warm_bytes)[:] = payload[: self.spec.warm_bytes]
        table.tier[layer, page] = Tier.WARM
        table.offset[layer, page] = offset
        table.refs["data"][layer, page] = self.arena.address + offset
        table.refs["kind"][layer, page] = KIND_WARM

    def adopt(self, layer: int, page: int, record: int) -> None:
        """Take over a sealed page that is on flash already, from a session: it is COLD. The caller sets its tokens."""
        table = self.table
        table.tier[layer, page] = Tier.COLD
        table.record[layer, page] = record
        table.last_used[layer, page] = self.step
        table.mass[layer, page] = 0
        table.settle(layer, page)
        ref = table.refs[layer, page]
        ref["data"] = 0
        ref["position"] = page * self.spec.page_size
        ref["kind"] = KIND_WARM
        self._forget(layer, page)

    def _forget(self, layer: int, page: int) -> None:
        if self.summaries is not None:
            self.summaries.forget(layer, page)

    def detach_store(self) -> None:
        """Do without the store, in which no page is that is not in RAM too."""
        assert not offloaded(self.table.tier).any(), "a page is in the store alone"
        self.table.record[:] = NOTHING
        self.store = None

    def room_for(self, n_pages: int, layer: int) -> int:
        """Make room for WARM pages in the middle of a step, once ``layer`` has noted which pages it uses.

        Pages leave that this step did not use, or, in layers that are yet to come, the last step did not use. Returns for how
        many there is room, up to ``n_pages``; one frame stays free for a page that is opened.

        Raises:
            StoreFull, StoreError: a page that must be written first could not be.
        """
        missing = n_pages - self._room()
        if missing > 0 and self.store is not None:
            to_come = np.arange(self.spec.n_layers) > layer
            unused = self.table.last_used < (self.step - to_come)[:, None]
            victims = self._candidates(Tier.WARM, unpinned=True, among=unused)
            with contextlib.suppress(WriteLimit):  # without room, pages are attended to from the staging ring
                self._send(pairs(victims[:missing]), victims)
        return min(n_pages, self._room())

    def _room(self) -> int:
        return self.arena.half_free_frames + 2 * max(0, self.arena.free_frames - 1)

    def summarise(self, layer: int, page: int, payload: Bytes) -> None:
        """Note the key bounds of a COLD page whose payload is at hand, for selective attention."""
        if self.summaries is not None:
            ref = self.table.refs[layer, page : page + 1].copy()
            ref["data"] = payload.ctypes.data
            self.summaries.add(layer, np.array([page]), ref)

    def spare_room(self) -> int:
        """Return how many WARM pages fit beside what open pages need."""
        return self.arena.half_free_frames + 2 * max(0, self.arena.free_frames - self.spec.n_layers - 1)

    def persist(self, pages: list[tuple[int, int]]) -> None:
        """Write the sealed pages (layer, page) among these that have no record yet; residency does not change.

        Raises:
            StoreFull, StoreError: none of them counts as written.
        """
        missing = [page for page in pages if self.table.record[page] == NOTHING]
        for page in missing:
            if self.table.tier[page] == Tier.HOT:
                self.seal(*page)
        if missing:
            self._write(missing)

    def share(self, layer: int, page: int, record: int) -> None:
        """Note that the store has a sealed page in RAM already, since another sequence wrote the same; residency stays."""
        if self.table.tier[layer, page] == Tier.HOT:
            self.seal(layer, page)
        self.table.record[layer, page] = record

    def free_page(self, layer: int, page: int) -> None:
        """Free a page in every tier."""
        table = self.table
        self._leave_ram(layer, page)
        self._free_record(layer, page)
        table.tier[layer, page] = Tier.FREE
        table.refs["mask"][layer, page] = 0
        table.refs["n_slots"][layer, page] = 0
        table.marked[layer, page] = False

    def _free_record(self, layer: int, page: int) -> None:
        if self.table.record[layer, page] != NOTHING:
            assert self.store is not None
            self.store.free(int(self.table.record[layer, page]))
            self.table.record[layer, page] = NOTHING

    def _leave_ram(self, layer: int, page: int) -> None:
        table = self.table
        if table.tier[layer, page] == Tier.HOT:
            self.arena.give_frame(int(table.offset[layer, page]))
        elif table.tier[layer, page] == Tier.WARM:
            self.arena.give_half(int(table.offset[layer, page]))
        table.refs["data"][layer, page] = 0

    def replace(self, layer: int, page: int, content: Bytes) -> None:
        """Put a new sealed page in the place of one in RAM, of the same tier; it is not on flash yet."""
        self.arena.page(int(self.table.offset[layer, page]), content.size)[:] = content
        self.table.settle(layer, page)
        self._free_record(layer, page)
        if self.summaries is not None and self.table.tier[layer, page] == Tier.WARM:
            self.summaries.add(layer, np.array([page]), self.table.refs[layer, page : page + 1])

    def compress(self, n_pages: int) -> int:
        """Quantise up to ``n_pages`` sealed HOT pages, in the policy's order; returns how many."""
        victims = pairs(self._candidates(Tier.HOT)[:n_pages])
        for layer, page in victims:
            self.seal(layer, page)
        return len(victims)

    def offload(self, n_pages: int) -> int:
        """Move up to ``n_pages`` sealed WARM pages to the store, in the policy's order; returns how many.

        Raises:
            StoreFull, StoreError: nothing changed.
        """
        if self.store is None:
            return 0
        victims = self._candidates(Tier.WARM)
        return self._send(pairs(victims[:n_pages]), victims)

    def _send(self, chosen: list[tuple[int, int]], following: NDArray[np.int64]) -> int:
        """Move WARM pages to the store; ``following`` may be written ahead with them. Returns how many left RAM.

        When the day's writes are used up, pages that are in the store already leave instead.

        Raises:
            WriteLimit: there are none, and none may be dropped. StoreFull, StoreError: the store refused. Nothing changed.
        """
        assert self.store is not None
        if any(self.table.record[victim] == NOTHING for victim in chosen):
            written = self.table.record[following[:, 0], following[:, 1]] != NOTHING
            batch = max(len(chosen), WRITE_BATCH_BYTES // self.spec.record_bytes)
            # Written ahead, so that writes stay large, and layer by layer, so that reads will: what lies side by side comes
            # back in one request. A written page later leaves without a write.
            try:
                ahead = pairs(by_layer(following[~written])[:batch])
                self._write(sorted({*ahead, *(v for v in chosen if self.table.record[v] == NOTHING)}))
            except WriteLimit:
                clean = pairs(following[written][: len(chosen)])
                self.counters.pages_held_back += len(chosen) - len(clean)
                if not clean and not self.options.allow_drop:
                    raise
                chosen = clean
        for layer, page in chosen:
            self._leave_ram(layer, page)
            self.table.tier[layer, page] = self.store.tier(int(self.table.record[layer, page]))
        self.counters.pages_offloaded += len(chosen)
        return len(chosen)

    def drop(self, n_pages: int) -> int:
        """Forget up to ``n_pages`` unpinned sealed pages, in the policy's order; returns how many."""
        both = [self._candidates(tier, unpinned=True) for tier in (Tier.HOT, Tier.WARM)]
        victims = pairs(np.concatenate(both)[:n_pages])
        for layer, page in victims:
            self._free_record(layer, page)
            self._leave_ram(layer, page)
            self.table.tier[layer, page] = Tier.DROPPED
        self.counters.pages_dropped += len(victims)
        return len(victims)

    def set_budget(self, budget_bytes: int) -> None:
        """Shrink or grow the budget while running; pages that no longer fit are reclaimed now.

        Raises:
            BudgetError: below what one open page per layer needs; OutOfPages, StoreError: not enough could be
                reclaimed, and the old budget stays.
        """
        if budget_bytes < self.least_bytes(self.spec):
            raise BudgetError(
                f"a KV budget of {format_bytes(budget_bytes)} is too small; this cache needs"
                f" {format_bytes(self.least_bytes(self.spec))}"
            )
        target = budget_bytes // self.spec.frame_bytes
        if target < self.arena.n_frames:
            self.make_room(self.arena.n_frames - target)
            self.arena.shrink(target)
            self._move_below(target * self.spec.frame_bytes)
            self.arena.release()
        else:
            self.arena.grow(min(target, self.options.budget_bytes // self.spec.frame_bytes))

    def _move_below(self, end: int) -> None:
        """Move the pages that lie at ``end`` or above into free room below it, of which there is enough."""
        table, arena = self.table, self.arena
        for layer, page in np.argwhere((table.tier <= Tier.WARM) & (table.offset >= end)).tolist():
            hot = table.tier[layer, page] == Tier.HOT
            size = self.spec.hot_bytes if hot else self.spec.warm_bytes
            offset = arena.take_frame() if hot else arena.take_half()
            arena.page(offset, size)[:] = arena.page(int(table.offset[layer, page]), size)
            table.offset[layer, page] = offset
            table.refs["data"][layer, page] = arena.address + offset

    def make_room(self, n_frames: int) -> None:
        """Free at least ``n_frames`` frames: compress, then offload, then, only if allowed, drop.

        Raises:
            OutOfPages: no page may leave memory. StoreFull, StoreError: flash refused. No value was changed.
        """
        while self.arena.free_frames < n_frames:
            short = 2 * (n_frames - self.arena.free_frames)
            # A few more than asked for, so that victims are chosen once per batch; never much of a small arena.
            batch = min(8, self.arena.n_frames // 8)
            if not self._reclaim(max(short, batch)):
                way_out = (
                    "raise the budget" if self.store else "raise the budget, or give an offload folder (--offload DIR)"
                )
                if self.options.allow_drop:
                    kept = f"the first of each layer, its last {self.options.recent_pages}, a marked span"
                    stuck = f"pinned pages are never dropped ({kept})"
                elif self.store and not self.options.compress:
                    stuck = "nothing is compressed here (quantization_enabled=False), and only INT8 pages are offloaded"
                    way_out = "compress_pages() does it, or allow dropping, or raise the budget"
                elif self.store:
                    stuck = "every page in memory is being filled"
                else:
                    stuck, way_out = "no page may leave memory", f"{way_out}, or allow dropping (--allow-drop)"
                raise OutOfPages(
                    f"{n_frames} frames of {format_bytes(self.spec.frame_bytes)} are needed, {self.arena.free_frames} are"
                    f" free, and {stuck}: {way_out}"
                )

    def reclaim_to_threshold(self) -> None:
        """Reclaim what can be reclaimed above the threshold; what cannot stays, within the budget."""
        limit = int(self.arena.n_frames * self.options.threshold)
        while self.arena.n_frames - self.arena.free_frames > limit and self._reclaim(2):
            pass

    def _reclaim(self, n_pages: int) -> bool:
        """Take the first step that helps: pair up half-used frames, compress, offload, drop; False if none does."""
        if self.arena.half_free_frames >= 2:
            self._merge_halves()
            return True
        return bool(
            (self.options.compress and self.compress(n_pages))
            or self.offload(n_pages)
            or (self.options.allow_drop and self.drop(n_pages))
        )

    def _merge_halves(self) -> None:
        """Move a WARM page from one half-used frame into the other, which frees a frame."""
        source = self.arena.half_page()
        at_source = (self.table.tier == Tier.WARM) & (self.table.offset == source)
        layer, page = (int(index[0]) for index in np.nonzero(at_source))
        payload = self.arena.page(source, self.spec.warm_bytes).copy()
        self.arena.give_half(source)
        self._place_warm(layer, page, payload)

    def seal(self, layer: int, page: int) -> None:
        """Quantise a full HOT page: it becomes WARM and never changes again. Cannot fail: it frees more than it takes."""
        table = self.table
        offset = int(table.offset[layer, page])
        self.kernels.pack_warm(
            self.arena.page(offset, self.spec.hot_bytes),
            self._scratch,
            self.spec.n_kv_heads,
            self.spec.head_dim,
            self.spec.page_size,
            self.spec.page_size,
        )
        self.arena.give_frame(offset)
        self._place_warm(layer, page, self._scratch)
        table.settle(layer, page)
        if self.summaries is not None:
            self.summaries.add(layer, np.array([page]), table.refs[layer, page : page + 1])
        self.counters.pages_compressed += 1

    def _write(self, pages: list[tuple[int, int]]) -> None:
        assert self.store is not None
        assert (self.table.record[tuple(zip(*pages, strict=True))] == NOTHING).all(), "a page is written once"
        payloads = [self.arena.page(int(self.table.offset[page]), self.spec.warm_bytes) for page in pages]
        records = self.store.write([tag(*page) for page in pages], payloads)
        for page, record in zip(pages, records, strict=True):
            self.table.record[page] = record

    def _candidates(
        self, tier: int, *, unpinned: bool = False, among: NDArray[np.bool_] | None = None
    ) -> NDArray[np.int64]:
        return candidates(self.table, self.options, tier, unpinned=unpinned, among=among)


def by_layer(victims: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sort victims [n, 2] by page within each layer, the layers in the order of their first victims."""
    _, first, layer = np.unique(victims[:, 0], return_index=True, return_inverse=True)
    return victims[np.lexsort((victims[:, 1], first[layer]))]


def tag(layer: int, page: int) -> int:
    """Return the number that identifies a page in its record."""
    return layer << 32 | page
