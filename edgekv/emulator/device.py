"""A device that runs apps on this machine: its memory limit, drive, speed, heat and clock, and what happens to it.

with Device("android-low-4gb", app_limit="1.2GB") as phone:
    with phone.open("llama.edgekv", context=4096) as generator:
        text = "".join(generator.stream("Once upon a time"))
    assert phone.peak_bytes < phone.limit_bytes
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekv.bundle import Manifest, read_manifest
from edgekv.device_profiles import DeviceProfile, kv_budget, load
from edgekv.device_profiles.geometry import Geometry
from edgekv.device_profiles.schema import Thermal
from edgekv.device_profiles.speed import paged_seconds
from edgekv.device_profiles.thermal import ThermalState
from edgekv.errors import EdgeKVError
from edgekv.runtime.generate import Generator
from edgekv.runtime.options import RunOptions
from edgekv.runtime.pages.budget import RUNTIME_OVERHEAD_BYTES, BudgetPlan
from edgekv.runtime.pages.cache import KVCache
from edgekv.runtime.storage.medium import Medium
from edgekv.runtime.system.pressure import Calm, Pressure
from edgekv.settings import APP_LIMIT, SEED
from edgekv.sizes import format_bytes
from edgekv.tiers import Tier

from .charges.cost import StepCost
from .charges.meter import DeviceMeter
from .clock import Clock
from .drive import EmulatedMedium
from .events import Agenda, Event
from .link import Link, LinkTraffic
from .memory import AppMemory
from .timeline import Timeline


class Device:
    """A :class:`~edgekv.runtime.machine.Machine` that computes the time, memory and flash traffic of a device.

    The runtime on it is the real one: pages, policies, files, kernels, tokens. Equal seeds, profiles and requests give equal
    times and equal faults, whatever the speed of this machine.

    Args:
        profile: its name, the path of its file, or the profile.
        app_limit: what the system grants the app, instead of what the profile says: bytes, or ``"1.2GB"``.
        seed: of the faults.
        link: to the object store that an app may use (``offload="s3://..."``).

    Raises:
        ProfileError: there is no such profile. UsageError: the limit is no size.
    """

    def __init__(
        self,
        profile: str | Path | DeviceProfile,
        *,
        app_limit: int | str | None = None,
        seed: int = 0,
        events: tuple[Event, ...] = (),
        link: Link | None = None,
    ) -> None:
        found = profile if isinstance(profile, DeviceProfile) else load(str(profile))
        if app_limit is not None:
            found = _with_limit(found, APP_LIMIT.check(app_limit))
        self.profile = found
        self._agenda = Agenda()
        self.memory = AppMemory(found.memory, found.memory.app_limit_bytes.value)
        self.clock = Clock(found.thermal, self._agenda, self.memory.check)
        self.medium = EmulatedMedium(found.flash, self.clock, SEED.check(seed))
        self.timeline = Timeline()
        self._link = LinkTraffic(link or Link())
        self.pages_used = self.pages_fetched = 0
        self._announced_bytes: int | None = None
        self._step_tokens = 0
        self._step_began_s = 0.0
        self.meter = DeviceMeter(self)
        for event in events:
            self.schedule(event)

    # -- what a test asks --------------------------------------------------------------------------------------

    def open(self, bundle: str | Path, options: RunOptions | None = None, **changes: Any) -> Generator:
        """Start an app on the device: a generator whose KV budget is what the device leaves, unless options name one.

        Args:
            changes: fields of :class:`RunOptions`, such as ``context=4096``.

        Raises:
            BudgetError: nothing is left for the cache.
        """
        options = dataclasses.replace(options or RunOptions(prefixes=False), **changes)
        if options.kv_budget is None:
            options = dataclasses.replace(options, kv_budget=self.budget_bytes(read_manifest(Path(bundle))))
        return Generator.open(bundle, options, self)

    def budget_bytes(self, manifest: Manifest) -> int:
        """Return the KV budget that the device leaves for a bundle.

        Raises:
            BudgetError: nothing is left.
        """
        return kv_budget(self.profile, manifest.weights_bytes(), RUNTIME_OVERHEAD_BYTES).kv_bytes

    @property
    def limit_bytes(self) -> int:
        """What the system grants the app now."""
        return self.memory.limit_bytes

    @property
    def peak_bytes(self) -> int:
        """Largest resident set of the app so far."""
        return self.memory.peak_bytes

    def schedule(self, event: Event) -> None:
        """Let something happen at a virtual time."""
        self._agenda.add(event.at_s, lambda: self._happen(event))

    def rest(self, seconds: float) -> None:
        """Let time pass without load."""
        self.rest_until(self.clock.now + seconds)

    def rest_until(self, moment_s: float) -> None:
        """Let time pass without load until a virtual time."""
        self.end_step()
        self.clock.wait_until(moment_s)
        self._sample()

    def end(self) -> None:
        """The app is gone, by itself or killed; memory is free again."""
        self.end_step()
        if self.memory.weights_bytes:
            self._sample()  # what it held until now
        self.memory.end()
        self._sample()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    # -- what the runtime asks (see edgekv.runtime.machine) ------------------------------------------------------

    def now(self) -> float:
        """Return the virtual time."""
        return self.clock.now

    def open_medium(self) -> Medium:
        """Return the drive."""
        return self.medium

    def watch(self, cache: KVCache, plan: BudgetPlan, abandon: Callable[[], None]) -> None:
        """Count the memory of a new cache."""
        self.memory.watch(cache, plan, abandon)
        self._link.begin()
        self._step_tokens = 0

    def pressure(self) -> Pressure:
        """Return calm: the scenario says when memory runs short, and what the app answers."""
        return Calm()

    def peak_rss_bytes(self) -> int:
        """Return the largest resident set of the app so far."""
        return self.memory.peak_bytes

    # -- what passes -------------------------------------------------------------------------------------------

    def load(self, manifest: Manifest) -> None:
        """Read the weights of a bundle from the drive; the app runs from then on."""
        model = Geometry.from_model(manifest.model)
        cost = StepCost.of(self.profile, model, manifest.engine, manifest.weights, manifest.page_size)
        self.load_weights(cost, manifest.weights_bytes())

    def load_weights(self, cost: StepCost, size_bytes: int) -> None:
        """Read so many bytes of weights from the drive, of a model whose steps ``cost`` prices."""
        self.meter.price(cost)
        self.clock.wait_until(self.medium.charge_read(self.clock.now, size_bytes))
        self.memory.weights_bytes = size_bytes
        self._sample()

    def linked_until(self, asked_s: float) -> float:
        """Return when what was asked of the object store at ``asked_s`` is through."""
        cache = self.memory.cache
        store = cache.manager.store if cache is not None else None
        return self._link.done(asked_s, store.counters) if store is not None else asked_s

    def begin_step(self, n_tokens: int) -> None:
        """The app begins a step; it answers to a new limit before."""
        self.end_step()
        if self._announced_bytes is not None:
            limit_bytes, self._announced_bytes = self._announced_bytes, None
            self._give_back(limit_bytes)
        self._step_tokens = n_tokens
        self._step_began_s = self.clock.now

    def end_step(self) -> None:
        """Count the step that was begun last, if there is one."""
        n_tokens, self._step_tokens = self._step_tokens, 0
        if not n_tokens or self.memory.cache is None:
            return
        memory, timeline, store = self.memory, self.timeline, self.memory.cache.manager.store
        if store is not None:
            self.clock.wait_until(self._link.done(self.clock.now, store.counters))
        if memory.profile.kill == "swap" and memory.rss_bytes > memory.limit_bytes:
            paged = paged_seconds(memory.rss_bytes, memory.limit_bytes, self.profile.flash)
            self.clock.wait_until(self.clock.now + paged)
        seconds = self.clock.now - self._step_began_s
        if timeline.due:
            self._sample(n_tokens, seconds)
        timeline.stepped(n_tokens, seconds)

    def _sample(self, n_tokens: int = 0, seconds: float = 0.0) -> None:
        """Note how things stand, after a step or where nothing runs."""
        cache, memory, drive = self.memory.cache, self.memory, self.medium.drive
        held = hot = warm = cold = 0
        if cache is not None:
            tiers, spec = cache.table.tier.tobytes(), cache.spec
            held = max(cache.table.n_slots.tolist())
            hot, warm = tiers.count(Tier.HOT) * spec.hot_bytes, tiers.count(Tier.WARM) * spec.warm_bytes
            cold = tiers.count(Tier.COLD) * spec.warm_bytes
        self.timeline.sample(
            self.clock.now, seconds, n_tokens, held, self.clock.heat.speed, memory.rss_bytes, memory.limit_bytes,
            hot, warm, cold, self.pages_used, self.pages_fetched, drive.bytes_read, drive.bytes_written,
        )  # fmt: skip

    def count_used(self, pages: int) -> None:
        """Attention read so many pages."""
        self.pages_used += pages

    def count_fetched(self, pages: int) -> None:
        """So many pages came from flash."""
        self.pages_fetched += pages

    # -- what happens ------------------------------------------------------------------------------------------

    def _happen(self, event: Event) -> None:
        memory, medium, thermal = self.memory, self.medium, self.profile.thermal
        if event.kind == "memory-pressure":
            whole = memory.profile.app_limit_bytes.value
            self._press(event, event.limit_bytes(whole))
            self._later(event, lambda: self._press(event, whole))
        elif event.kind == "kill":
            if memory.weights_bytes:
                memory.kill("the system killed the app")
            self._log(event, "no app was running")
        elif event.kind == "disk-full":
            medium.full = True
            self._log(event, "the drive is full")
            self._later(event, lambda: setattr(medium, "full", False))
        elif event.kind in ("read-errors", "damage"):
            name = "error_rate" if event.kind == "read-errors" else "damage_rate"
            setattr(medium, name, event.rate)
            self._log(event, f"{event.rate:.2%} of the reads are hit from now on")
            self._later(event, lambda: setattr(medium, name, 0.0))
        elif event.kind == "heat":
            self.clock.heat = heated(thermal, event.share or 0.0)
            self._log(event, f"{self.clock.heat.speed:.0%} of the cold speed is left")

    def _press(self, event: Event, limit_bytes: int) -> None:
        """Announce a new limit to the app, and enforce it after the grace."""
        self._announced_bytes = limit_bytes
        self._log(event, f"the app may use {format_bytes(limit_bytes)}, enforced in {event.grace_s:g} s")
        self._agenda.add(self.clock.now + event.grace_s, lambda: setattr(self.memory, "limit_bytes", limit_bytes))

    def _later(self, event: Event, undo: Callable[[], None]) -> None:
        if event.duration_s is None:
            return

        def end() -> None:
            undo()
            self._log(event, "over")

        self._agenda.add(self.clock.now + event.duration_s, end)

    def _give_back(self, limit_bytes: int) -> None:
        """Let the app answer to a new limit as it can: by a smaller KV budget."""
        cache = self.memory.cache
        if cache is None:
            return
        manager = cache.manager
        target = min(
            self.memory.arena_bytes(limit_bytes, manager.least_bytes(manager.spec)), manager.options.budget_bytes
        )
        before = manager.arena.used_bytes
        try:
            manager.set_budget(target)
        except EdgeKVError as error:
            self.timeline.log(self.clock.now, "reclaim", f"the app could not shrink its cache: {error}")
            return
        gone = before - manager.arena.used_bytes
        self.timeline.log(
            self.clock.now,
            "reclaim",
            f"the app set its KV arena to {format_bytes(target)}; {format_bytes(gone)} left memory",
        )

    def _log(self, event: Event, text: str) -> None:
        self.timeline.log(self.clock.now, event.kind, text)


def heated(thermal: Thermal, share: float) -> ThermalState:
    """Return a device that is ``share`` of the way from cold to as slow as heat makes it."""
    state = ThermalState(thermal)
    state.advance(-thermal.time_constant_s.value * math.log(1 - share) if share < 1 else math.inf)
    return state


def _with_limit(profile: DeviceProfile, limit_bytes: int) -> DeviceProfile:
    old = profile.memory.app_limit_bytes
    limit = dataclasses.replace(old, value=limit_bytes, source="as asked for", confidence="high")
    return dataclasses.replace(profile, memory=dataclasses.replace(profile.memory, app_limit_bytes=limit))
