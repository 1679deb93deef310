"""The arena as the operating system sees it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from edgekv.runtime.pages.arena import Arena
from edgekv.runtime.system.buffers import LEAST_HUGE_BYTES
from edgekv.spec import PageSpec

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SPEC = PageSpec(1, 8, 64, 32)


def mapping_of(address: int) -> str:
    """What /proc/self/smaps says of the mapping at an address."""
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(part, 16) for part in entry.split()[0].split("-"))
        if start <= address < end:
            return entry
    raise AssertionError(f"nothing is mapped at {address:#x}")


def resident_kib(address: int) -> int:
    """The resident part of the mapping at an address."""
    found = re.search(r"Rss: +(\d+) kB", mapping_of(address))
    assert found
    return int(found[1])


def test_a_large_arena_asks_for_huge_pages_of_its_own() -> None:
    arena = Arena(SPEC, 4 * LEAST_HUGE_BYTES)
    entry = mapping_of(arena.address)
    assert entry.split()[1] == "rw-p"
    assert "hg" in entry.split("VmFlags:")[1].split()


def test_untouched_frames_cost_no_memory() -> None:
    arena = Arena(SPEC, 4 * LEAST_HUGE_BYTES)
    before = resident_kib(arena.address)
    arena.buffer[0] = 1
    assert 4 <= resident_kib(arena.address) - before <= 2048, "more than the huge page of the one touched byte"


def test_a_shrunken_arena_gives_its_memory_back() -> None:
    arena = Arena(SPEC, 2 * LEAST_HUGE_BYTES)
    frames = arena.n_frames
    arena.buffer[:] = 1
    arena.shrink(frames // 2)
    arena.release()
    kept = frames // 2 * SPEC.frame_bytes
    assert arena.buffer[:kept].all()
    assert not arena.buffer[kept + 4096 :].any(), "the memory was kept by the system and came back as it was"
