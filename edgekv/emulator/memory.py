"""The memory of the app as the operating system of the device would count it, against its limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from edgekv.device_profiles.schema import Memory
from edgekv.runtime.pages.budget import RUNTIME_OVERHEAD_BYTES, BudgetPlan
from edgekv.runtime.pages.cache import KVCache
from edgekv.sizes import format_bytes


class AppKilled(BaseException):
    """The operating system of the device killed the app.

    Not an Exception: an app cannot catch its own death, so what catches errors must let this pass, as it lets
    KeyboardInterrupt pass.
    """


@dataclass
class AppMemory:
    """Resident bytes of one app: weights, the rest of the process, frames of the arena that were touched, the staging ring.

    ``limit_bytes``: what the system grants now. ``peak_bytes``: over all lives of the app.
    """

    profile: Memory
    limit_bytes: int
    weights_bytes: int = 0
    peak_bytes: int = 0
    _cache: KVCache | None = None
    _staging_bytes: int = 0
    _touched_frames: int = 0
    _frame_bytes: int = 0
    _abandon: Callable[[], None] = field(default=lambda: None)

    @property
    def rss_bytes(self) -> int:
        """Resident set of the app now; 0 when it does not run. Frames that were touched stay until the arena shrinks."""
        if not self.weights_bytes:
            return 0
        if self._cache is None:
            return self.weights_bytes + RUNTIME_OVERHEAD_BYTES
        arena = self._cache.manager.arena
        touched, frames = self._touched_frames, arena.n_frames
        used = frames - arena.free_frames
        if used > touched or touched > frames:
            self._touched_frames = touched = min(max(touched, used), frames)
        return self.weights_bytes + RUNTIME_OVERHEAD_BYTES + touched * self._frame_bytes + self._staging_bytes

    @property
    def cache(self) -> KVCache | None:
        """The cache of the app, if it has one."""
        return self._cache

    def watch(self, cache: KVCache, plan: BudgetPlan, abandon: Callable[[], None]) -> None:
        """The app has a new cache."""
        self._cache, self._staging_bytes, self._abandon = cache, plan.staging_bytes, abandon
        self._touched_frames, self._frame_bytes = 0, cache.spec.frame_bytes

    def check(self) -> None:
        """Note the peak, and enforce the limit.

        Raises:
            AppKilled: the app is above it, on a system that kills.
        """
        rss_bytes = self.rss_bytes
        if rss_bytes > self.peak_bytes:
            self.peak_bytes = rss_bytes
        if rss_bytes > self.limit_bytes and self.profile.kill != "swap":
            self.kill(
                f"{self.profile.kill}: {format_bytes(rss_bytes)} are above the limit of {format_bytes(self.limit_bytes)}"
            )

    def kill(self, reason: str) -> None:
        """End the app: its session keeps what was committed, everything else is gone.

        Raises:
            AppKilled: always.
        """
        self._abandon()
        self.end()
        raise AppKilled(reason)

    def end(self) -> None:
        """The process is gone."""
        self._cache, self.weights_bytes, self._staging_bytes, self._touched_frames = None, 0, 0, 0
        self._abandon = lambda: None

    def arena_bytes(self, limit_bytes: int, least_bytes: int) -> int:
        """Return the arena that fits a limit with the profile's headroom, or ``least_bytes`` if that is more."""
        granted = int(limit_bytes * (1 - self.profile.headroom_share.value))
        rest = self.weights_bytes + RUNTIME_OVERHEAD_BYTES + self._staging_bytes
        return max(granted - rest, least_bytes)
