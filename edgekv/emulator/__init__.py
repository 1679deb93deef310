"""Devices that run on this machine: the real runtime, and a device whose time, memory and flash are computed."""

from edgekv.emulator.device import Device
from edgekv.emulator.events import Event
from edgekv.emulator.link import Link
from edgekv.emulator.memory import AppKilled

__all__ = ["AppKilled", "Device", "Event", "Link"]
