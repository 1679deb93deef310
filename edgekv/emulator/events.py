"""What may happen to a device while an app runs, and when."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from edgekv.errors import UsageError
from edgekv.schema import Bytes, Seconds, Share
from edgekv.sizes import parse_bytes

#: The kinds of events, what each does, and the fields that it needs.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "memory-pressure": ("the limit of the app falls to `limit`, a size or a share (60%)", ("limit",)),
    "kill": ("the system kills the app", ()),
    "disk-full": ("every write fails", ()),
    "read-errors": ("reads from flash fail at `rate`, between 0 and 1", ("rate",)),
    "damage": ("reads from flash return a flipped bit at `rate`, between 0 and 1", ("rate",)),
    "heat": ("the device is `share` of the way from cold, 0, to as slow as heat makes it, 1", ("share",)),
}


@dataclass(frozen=True)
class Event:
    """One event; what each kind does: :data:`KINDS`.

    ``duration_s``: it ends by itself; not for kill and heat. ``grace_s``: a new limit is announced this long before the
    system enforces it.

    Raises:
        UsageError: there is no such kind, or a field is missing or impossible.
    """

    at_s: Seconds
    kind: str
    limit: Bytes | str | None = None
    rate: Share | None = None
    share: Share | None = None
    duration_s: Annotated[float, Meta(gt=0, le=1e12)] | None = None
    grace_s: Seconds = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"unknown event {self.kind!r}; choose one of {', '.join(KINDS)}")
        for name in KINDS[self.kind][1]:
            if getattr(self, name) is None:
                raise UsageError(f"an event {self.kind!r} needs `{name}`: {KINDS[self.kind][0]}")
        self.limit_bytes(1)

    def limit_bytes(self, whole_bytes: int) -> int:
        """Return the new limit; a share is one of ``whole_bytes``.

        Raises:
            UsageError: it is neither a size nor a share.
        """
        if self.limit is None or isinstance(self.limit, int):
            return self.limit or whole_bytes
        if not self.limit.strip().endswith("%"):
            return parse_bytes(self.limit)
        try:
            percent = float(self.limit.strip()[:-1])
        except ValueError:
            percent = -1.0
        if not 0 <= percent <= 100:
            raise UsageError(f"not a share: {self.limit!r}; write it like 60%")
        return int(whole_bytes * percent / 100)


class Agenda:
    """What is to be done at which virtual time; ties in the order in which they were added."""

    def __init__(self) -> None:
        self.next_s = float("inf")
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def add(self, at_s: float, action: Callable[[], None]) -> None:
        """Have something done at a time."""
        heapq.heappush(self._waiting, (at_s, next(self._count), action))
        self.next_s = self._waiting[0][0]

    def run(self, now_s: float) -> None:
        """Do what is due; an action may raise, the rest stays."""
        while self.next_s <= now_s:
            _, _, action = heapq.heappop(self._waiting)
            self.next_s = self._waiting[0][0] if self._waiting else float("inf")
            action()
