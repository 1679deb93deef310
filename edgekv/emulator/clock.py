"""Virtual time: it passes when someone computes, waits or rests, and never by itself."""

from __future__ import annotations

from collections.abc import Callable

from edgekv.device_profiles.schema import Thermal
from edgekv.device_profiles.thermal import ThermalState

from .events import Agenda


class Clock:
    """The time of an emulated device, and its heat: computing heats, waiting cools.

    Args:
        agenda: done as time comes to it. passed: called after each advance.
    """

    def __init__(self, thermal: Thermal, agenda: Agenda, passed: Callable[[], None]) -> None:
        self.now = 0.0
        self.busy_s = 0.0
        self.heat = ThermalState(thermal)
        self._agenda = agenda
        self._passed = passed

    def compute(self, cold_seconds: float) -> None:
        """Compute for what takes ``cold_seconds`` on a device that is cold."""
        self.work(cold_seconds)
        self._passed()

    def work(self, *cold_seconds: float) -> None:
        """Compute one thing after another, during which the app takes no memory."""
        for cold_s in cold_seconds:
            seconds = self.heat.work(cold_s)
            self.now += seconds
            self.busy_s += seconds
            if self._agenda.next_s <= self.now:
                self._agenda.run(self.now)
                self._passed()

    def wait_until(self, moment_s: float) -> None:
        """Wait; does nothing when the moment has passed."""
        while moment_s > self.now:
            stop_s = max(min(moment_s, self._agenda.next_s), self.now)
            self.heat.advance(stop_s - self.now, load=0.0)
            self.now = stop_s
            if self._agenda.next_s <= stop_s:
                self._agenda.run(stop_s)
            self._passed()
