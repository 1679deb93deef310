"""Reads ahead of an emulated device: the real reader, in the time of the drive and of the link to an object store."""

from __future__ import annotations

from collections.abc import Callable

from edgekv.errors import EdgeKVError
from edgekv.runtime.kernels.interface import Pool, RowStreams
from edgekv.runtime.storage.interface import PageStore
from edgekv.runtime.storage.reads import Reads
from edgekv.runtime.storage.record import Wanted
from edgekv.runtime.storage.ring import PageReader, Request
from edgekv.spec import PageSpec

from ..clock import Clock
from ..drive import EmulatedMedium
from ..link import LinkTraffic
from .cost import StepCost
from .native_walk import EmulatedStream, StillRows


class _AtOnce(Reads):
    """Reads that the drive does not know how to do ahead happen when they are asked for, on the thread that runs the app."""

    def call(self, read: Callable[[], None]) -> Callable[[], None]:
        try:
            read()
        except EdgeKVError as error:
            failed = error

            def fail() -> None:
                raise failed

            return fail
        return lambda: None


class EmulatedReader(PageReader):
    """A :class:`PageReader` whose reads take the time of the drive, beside the computing that goes on meanwhile."""

    def __init__(
        self,
        store: PageStore,
        spec: PageSpec,
        capacity: int,
        ring: int,
        medium: EmulatedMedium,
        clock: Clock,
        cost: StepCost,
        link: LinkTraffic,
        fetched: Callable[[int], None],
        pool: Pool,
    ) -> None:
        super().__init__(store, spec, capacity, ring, _AtOnce(pool))
        self._medium = medium
        self._clock = clock
        self._cost = cost
        self._link = link
        self._fetched = fetched
        self._done_s = [0.0] * ring  # by slot

    def stream(self, n_layers: int) -> RowStreams | None:
        """Return the kernels' way, at the speed of the drive."""
        native = StillRows() if self._medium.still else super().stream(n_layers)
        if native is not None:
            ring = len(self._done_s)
            self._stream = EmulatedStream(native, ring, self._medium, self._clock, self._cost, self._fetched)
        return self._stream

    def request(self, wanted: Wanted) -> int | None:
        """Ask the drive, and start to read."""
        now = self._medium.asked_until = self._clock.now
        slot = super().request(wanted)
        if slot is not None:
            self._done_s[slot] = max(self._medium.asked_until, self._link.done(now, self._store.counters))
        return slot

    def _finish(self, request: Request) -> None:
        super()._finish(request)
        self._clock.compute(self._cost.fetch(len(request.wanted.records)))
        self._clock.wait_until(self._done_s[request.slot])
        self._fetched(len(request.wanted.records))
