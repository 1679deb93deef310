"""Heat: how much of a device's speed is left after a time under load.

``speed = floor + (1 - floor) x`` where x starts at 1 and relaxes with one time constant: towards 0 under load, towards 1 when
idle. Under steady load this is ``floor + (1 - floor) exp(-t / tau)``, which fits published ten-minute runs on phones.
"""

from __future__ import annotations

import math

from .schema import Thermal


class ThermalState:
    """The heat of one device; time is advanced by hand, so that equal histories give equal speeds."""

    def __init__(self, thermal: Thermal) -> None:
        self._floor = thermal.floor_share.value
        self._time_constant_s = thermal.time_constant_s.value
        self._cold = 1.0

    @property
    def speed(self) -> float:
        """Share of the cold speed that is left now."""
        return self._floor + (1.0 - self._floor) * self._cold

    def work(self, cold_seconds: float) -> float:
        """Do under full load what takes ``cold_seconds`` on a cold device; return how long it took, at the speed of now."""
        seconds = cold_seconds / (self._floor + (1.0 - self._floor) * self._cold)
        self._cold *= math.exp(-seconds / self._time_constant_s)
        return seconds

    def advance(self, seconds: float, load: float = 1.0) -> None:
        """Let time pass under a load between 0 (idle, it cools) and 1 (full, it heats)."""
        target = 1.0 - load
        self._cold = target + (self._cold - target) * math.exp(-seconds / self._time_constant_s)


def sustained_speed(thermal: Thermal, seconds: float) -> float:
    """Return the share of the cold speed after so many seconds of load."""
    state = ThermalState(thermal)
    state.advance(seconds)
    return state.speed
