"""Reading ahead: a right guess saves time, a wrong one changes nothing."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv.errors import CorruptPage
from edgekv.runtime.storage.flash import FlashStore
from edgekv.runtime.storage.record import Wanted
from edgekv.runtime.storage.ring import PageReader
from edgekv.runtime.storage.segments import SegmentStore
from edgekv.spec import PageSpec

SPEC = PageSpec(2, 2, 32, 16)


def wanted(records: list[int], tags: list[int] | None = None) -> Wanted:
    return Wanted(records, records if tags is None else tags, SPEC.warm_bytes)


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[tuple[FlashStore, PageReader, list[np.ndarray]]]:
    store = FlashStore(tmp_path, SPEC)
    pages = list(np.random.default_rng(0).integers(0, 256, (20, SPEC.warm_bytes), np.uint8))
    assert store.write(list(range(20)), pages) == list(range(20))
    reader = PageReader(store, SPEC, 8)
    yield store, reader, pages
    reader.close()
    store.close()


def payloads(rows: np.ndarray) -> np.ndarray:
    return rows[:, 64 : 64 + SPEC.warm_bytes]


def test_what_was_requested_is_there_and_the_addresses_point_at_the_payload(
    filled: tuple[FlashStore, PageReader, list[np.ndarray]],
) -> None:
    _, reader, pages = filled
    chosen = [3, 4, 5, 11, 12]
    reader.request(wanted(chosen))
    addresses, rows = reader.take(wanted(chosen))
    np.testing.assert_array_equal(payloads(rows), np.stack([pages[i] for i in chosen]))
    assert addresses.tolist() == [row.ctypes.data for row in payloads(rows)]


def test_a_wrong_guess_is_read_again(filled: tuple[FlashStore, PageReader, list[np.ndarray]]) -> None:
    _, reader, pages = filled
    reader.request(wanted([0, 1]))
    _, rows = reader.take(wanted([7, 8, 9]))
    np.testing.assert_array_equal(payloads(rows), np.stack(pages[7:10]))


def test_rows_that_were_taken_survive_the_next_request(
    filled: tuple[FlashStore, PageReader, list[np.ndarray]],
) -> None:
    _, reader, pages = filled
    _, first = reader.take(wanted([0, 1]))
    reader.request(wanted([5, 6]))
    _, second = reader.take(wanted([5, 6]))
    np.testing.assert_array_equal(payloads(first), np.stack(pages[:2]))
    np.testing.assert_array_equal(payloads(second), np.stack(pages[5:7]))


def test_damage_is_an_error_for_who_takes_it_and_for_nobody_else(
    filled: tuple[FlashStore, PageReader, list[np.ndarray]],
) -> None:
    store, reader, pages = filled
    os.pwrite(store.file.handle, b"\xff\x00\xff", 2 * SPEC.record_bytes + 100)
    reader.request(wanted([2]))
    _, rows = reader.take(wanted([4]))
    np.testing.assert_array_equal(payloads(rows), np.stack(pages[4:5]))
    with pytest.raises(CorruptPage):
        reader.take(wanted([2]))


def test_records_of_several_segments_come_at_once_and_one_whose_segment_is_gone_is_refused(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, SPEC)
    pages = list(np.random.default_rng(1).integers(0, 256, (9, SPEC.warm_bytes), np.uint8))
    records = store.write([0, 1, 2], pages[:3])
    store.retire()
    records += store.write([3, 4, 5], pages[3:6])
    reader = PageReader(store, SPEC, 8)
    mixed = [4, 0, 1, 5, 2]
    _, rows = reader.take(wanted([records[i] for i in mixed], mixed))
    np.testing.assert_array_equal(payloads(rows), np.stack([pages[i] for i in mixed]))
    gone = (9 << 32) + 1
    reader.request(wanted([records[0], gone], [0, 1]))
    with pytest.raises(CorruptPage):
        reader.take(wanted([records[0], gone], [0, 1]))
    _, rows = reader.take(wanted(records[3:], [3, 4, 5]))
    np.testing.assert_array_equal(payloads(rows), np.stack(pages[3:6]))
    reader.close()
    store.close()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_what_is_wanted_is_cut_into_runs_that_make_up_the_whole(places: list[int]) -> None:
    whole = wanted([place << 8 | at for at, place in enumerate(places)], list(range(len(places))))
    parts = whole.split(lambda record: record >> 8)
    assert [record for _, part, _ in parts for record in part.records] == whole.records
    assert [tag for _, part, _ in parts for tag in part.tags] == whole.tags
    assert [row for _, _, rows in parts for row in range(rows.start, rows.stop)] == list(range(len(places)))
    assert all({record >> 8 for record in part.records} == {place} for place, part, _ in parts)
    assert all(one != other for (one, _, _), (other, _, _) in itertools.pairwise(parts))
