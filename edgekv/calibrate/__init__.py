"""Measures this machine and writes what it finds as a device profile."""

from .calibration import Calibration, calibrate
from .write import profile_toml

__all__ = ["Calibration", "calibrate", "profile_toml"]
