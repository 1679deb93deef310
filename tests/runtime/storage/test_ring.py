"""Reading ahead: a right guess saves time, a wrong one changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgekv.errors import CorruptPage
from edgekv.runtime.storage.flash import FlashStore
from edgekv.runtime.storage.record import Wanted
from edgekv.runtime.storage.ring import PageReader
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
