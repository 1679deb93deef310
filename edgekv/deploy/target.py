"""Where a bundle goes: ``user@host[:port]`` over ssh, or ``adb[:serial]``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgekv.errors import UsageError
from edgekv.schema import shown

_HOST = re.compile(r"(?P<host>(?:[\w.+-]+@)?(?:[\w.-]+|\[[0-9A-Fa-f:.%\w]+\]))(?::(?P<port>[0-9]{1,5}))?")
_SERIAL = re.compile(r"[\w.:-]+")


@dataclass(frozen=True)
class Target:
    """``address``: of ssh, without the port; of adb, the serial, empty for the only device."""

    transport: str
    address: str
    port: int | None = None

    @property
    def host(self) -> str:
        """The address as ssh takes it: brackets are for what has a port behind it."""
        return self.address.replace("[", "").replace("]", "")

    def __str__(self) -> str:
        """Print it as it is typed."""
        if self.transport == "adb":
            return f"adb:{self.address}" if self.address else "adb"
        return f"{self.address}:{self.port}" if self.port is not None else self.address


def parse_target(text: str) -> Target:
    """Read a target.

    Raises:
        UsageError: it is none, or an option in its place.
    """
    transport, colon, serial = text.partition(":")
    if transport == "adb" and (not colon or _SERIAL.fullmatch(serial)) and not serial.startswith("-"):
        return Target("adb", serial)
    found = _HOST.fullmatch(text)
    port = int(found["port"]) if found and found["port"] else None
    if (
        transport == "adb"
        or not found
        or text.startswith("-")
        or "@-" in text
        or not (port is None or 0 < port < 65536)
    ):
        raise UsageError(f"TARGET must be user@host, user@host:port, adb or adb:SERIAL, not {shown(text)}")
    return Target("ssh", found["host"], port)
