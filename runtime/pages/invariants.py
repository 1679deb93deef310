"""What must hold of the pages of a cache at any time between two calls."""

from __future__ import annotations

import numpy as np

from edgekv.tiers import Tier

from .manager import PageManager
from .table import NOTHING, offloaded


def check_pages(manager: PageManager) -> None:
    """Assert the invariants of :class:`PageManager`."""
    table, arena = manager.table, manager.arena
    arena.check()
    held = arena.n_frames * manager.spec.frame_bytes
    assert arena.used_bytes <= held <= max(manager.options.budget_bytes, arena.used_bytes)
    hot, warm = table.tier == Tier.HOT, table.tier == Tier.WARM
    assert np.unique(table.offset[hot | warm]).size == np.count_nonzero(hot | warm), "two pages share their room"
    assert (table.offset[hot | warm] < held).all(), "a page lies in a frame that was given back"
    assert not (warm & ~table.sealed()).any(), "an open page is compressed"
    assert (table.record[offloaded(table.tier)] != NOTHING).all(), "a page outside RAM has no record"
    records = table.record[table.record != NOTHING]
    assert np.unique(records).size == records.size, "two pages share a record"
    assert np.array_equal(table.refs["data"] != 0, hot | warm)
    halves = arena.n_frames - arena.free_frames - np.count_nonzero(hot)
    assert 2 * halves - arena.half_free_frames == np.count_nonzero(warm)
