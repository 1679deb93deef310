"""The way from a device to an object store: how long pages take to get there and back.

The store itself is a real one, wherever the app's URL points (`memory:` needs none); its own time counts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekv.runtime.storage.interface import StoreCounters


@dataclass(frozen=True)
class Link:
    """A network: seconds until the first byte of an answer, and bytes/s in each direction.

    The defaults are an estimate of a store in the same region over Wi-Fi.
    """

    t0_s: float = 0.03
    read_bytes_per_s: float = 25e6
    write_bytes_per_s: float = 10e6


class LinkTraffic:
    """Turns what the counters of a store say into time: requests wait for ``t0`` together, their bytes share the link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._read = self._written = 0
        self._free_s = 0.0

    def done(self, now: float, counters: StoreCounters) -> float:
        """Return when everything that the counters gained since the last call, asked for at ``now``, is through."""
        read, written = counters.remote_bytes_read, counters.remote_bytes_written
        if (read, written) == (self._read, self._written):
            return now
        link = self._link
        seconds = (read - self._read) / link.read_bytes_per_s + (written - self._written) / link.write_bytes_per_s
        self._read, self._written = read, written
        self._free_s = max(self._free_s, now + link.t0_s) + seconds
        return self._free_s

    def begin(self) -> None:
        """A store that counts from nothing takes the place of the last one."""
        self._read = self._written = 0
