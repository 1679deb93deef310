"""Devices that run on this machine: the real runtime, and a device whose time, memory and flash are computed."""

from .device import Device
from .events import Event
from .link import Link
from .memory import AppKilled

__all__ = ["AppKilled", "Device", "Event", "Link"]
