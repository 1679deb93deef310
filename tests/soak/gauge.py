"""What a process holds between two rounds, and whether it grew."""

from __future__ import annotations

import itertools
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

#: Of its median RSS, what a process may take more in its last third: allocators never give everything back.
RSS_SHARE = 0.02
RSS_BYTES = 4 * 1024**2


@dataclass(frozen=True)
class Reading:
    """What a process holds. ``files``: names of files and folders in the places that are watched."""

    seconds: float
    rss_bytes: int
    threads: int
    descriptors: int
    files: frozenset[str]


class Gauge:
    """Reads a process, and keeps what it read.

    Args:
        folders: where files are counted.
    """

    def __init__(self, folders: list[Path]) -> None:
        self._folders = folders
        self.readings: list[Reading] = []

    def read(self, seconds: float) -> Reading:
        """Add a reading and return it; equal sets of files are kept once."""
        files = frozenset(str(path) for folder in self._folders for path in folder.rglob("*"))
        if self.readings and files == self.readings[-1].files:
            files = self.readings[-1].files
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.readings.append(
            Reading(
                seconds,
                pages * os.sysconf("SC_PAGE_SIZE"),
                len(os.listdir("/proc/self/task")),
                len(os.listdir("/proc/self/fd")),
                files,
            )
        )
        return self.readings[-1]

    def thirds(self) -> list[dict[str, int]]:
        """Return the median RSS and the most of everything else, of each third of the rounds."""
        return [
            {
                "rounds": len(part),
                "rss_bytes": int(statistics.median(reading.rss_bytes for reading in part)),
                "threads": max(reading.threads for reading in part),
                "descriptors": max(reading.descriptors for reading in part),
                "files": max(len(reading.files) for reading in part),
            }
            for part in self._parts()
        ]

    def grown(self) -> list[str]:
        """Return what the last third has more of than the second, in sentences."""
        found: list[str] = []
        if len(self.readings) < 6:
            return found
        _, second, last = self.thirds()
        allowed = max(RSS_BYTES, int(second["rss_bytes"] * RSS_SHARE))
        if last["rss_bytes"] > second["rss_bytes"] + allowed:
            found.append(f"RSS grew from {second['rss_bytes']} to {last['rss_bytes']} bytes")
        found += [
            f"{name} grew from {second[name]} to {last[name]}"
            for name in ("threads", "descriptors")
            if last[name] > second[name]
        ]
        before, after = (frozenset[str]().union(*(r.files for r in part)) for part in self._parts()[1:])
        if len(after) > len(before):
            found.append(f"files that are new: {', '.join(sorted(after - before)[:10])}")
        return found

    def _parts(self) -> list[list[Reading]]:
        count = len(self.readings)
        cuts = [0, count // 3, count * 2 // 3, count]
        return [self.readings[start:stop] for start, stop in itertools.pairwise(cuts)]
