"""Measures this machine and writes what it finds as a device profile."""

from edgekv.calibrate.machine import Calibration, calibrate
from edgekv.calibrate.write import profile_toml

__all__ = ["Calibration", "calibrate", "profile_toml"]
