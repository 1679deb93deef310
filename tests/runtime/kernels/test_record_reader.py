"""Rows of a file, read in the background and checked: whoever reads them, the same rows are good."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.storage.record import Wanted, pack_record
from edgekv.runtime.system.buffers import aligned_rows
from edgekv.spec import RECORD_CHECKED_FROM, RECORD_HEAD_BYTES, RECORD_HEADER_BYTES

PAYLOAD, ROW, COUNT = 1000, 4096, 300


def readers() -> list[tuple[str, str]]:
    """Return (kernels, how) of every reader that this system has."""
    native = [("native", how) for how in ("threads", "io_uring")] if load_kernels().isa() != "numpy" else []
    return [("numpy", "caller"), *native]


@pytest.fixture(params=readers(), ids=lambda reader: "-".join(reader))
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    kind, how = request.param
    kernels = load_kernels(kind)

    def make() -> Any:
        try:
            return kernels.RecordReader(2, how)
        except ValueError:
            pytest.skip(f"this system has no {how}")

    return make


@pytest.fixture
def reader(make: Callable[[], Any]) -> Any:
    return make()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file of records; the page of record i is tag i + 5."""
    rows = aligned_rows(COUNT, ROW)
    pages = np.random.default_rng(0).integers(0, 256, (COUNT, PAYLOAD), np.uint8)
    for record, (row, page) in enumerate(zip(rows, pages, strict=True)):
        pack_record(row, record, record + 5, page, PAYLOAD, None)
    (tmp_path / "pages").write_bytes(rows.tobytes())
    descriptor = os.open(tmp_path / "pages", os.O_RDWR)
    yield descriptor
    os.close(descriptor)


class Asked:
    """Records that were asked for, and the memory they come into."""

    def __init__(self, reader: Any, file: int, records: list[int]) -> None:
        self.wanted = Wanted(records, [record + 5 for record in records], PAYLOAD)
        self.rows = aligned_rows(len(records), ROW)
        self._reader = reader
        self._ticket = reader.submit(file, self.wanted.places, self.rows, self.wanted.heads, PAYLOAD)

    def result(self, pool: Any = None) -> list[int]:
        return list(self._reader.wait(self._ticket, pool))


def test_rows_come_from_where_they_are_in_any_order(reader: Any, file: int) -> None:
    asked = Asked(reader, file, [7, 8, 9, 2, 250, 251, 0])
    assert asked.result() == [1] * 7
    whole = os.pread(file, COUNT * ROW, 0)
    for row, record in zip(asked.rows, asked.wanted.records, strict=True):
        assert row.tobytes() == whole[record * ROW : (record + 1) * ROW]


def test_many_requests_at_once_with_more_reads_than_any_queue_holds(reader: Any, file: int) -> None:
    everything = [Asked(reader, file, list(range(first, COUNT, 3))) for first in (0, 1, 2)]
    for asked, pool in zip(reversed(everything), (None, load_kernels().ThreadPool(2), None), strict=True):
        assert asked.result(pool) == [1] * 100


def test_a_row_that_is_not_what_was_expected_is_not_good_and_its_neighbours_are(reader: Any, file: int) -> None:
    for record, at in ((1, 0), (3, 9), (5, 16), (7, 24), (9, 32), (11, 64), (13, 64 + PAYLOAD - 1), (15, 40)):
        [byte] = os.pread(file, 1, record * ROW + at)
        os.pwrite(file, bytes([byte ^ 16]), record * ROW + at)
    assert Asked(reader, file, list(range(17))).result() == [1, 0] * 8 + [1]
    os.pwrite(file, os.pread(file, ROW, 20 * ROW), 21 * ROW)
    assert Asked(reader, file, [20, 21, 22]).result() == [1, 0, 1]


def test_what_the_file_no_longer_has_is_not_good(reader: Any, file: int) -> None:
    os.truncate(file, 10 * ROW + 100)
    assert Asked(reader, file, [8, 9, 10, 11]).result() == [1, 1, 0, 0]
    assert Asked(reader, file, [200]).result() == [0]


def test_a_read_that_the_system_refuses_is_the_error_of_the_system(reader: Any, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    asked = Asked(reader, descriptor, [0])
    with pytest.raises(IsADirectoryError):
        asked.result()
    os.close(descriptor)


def test_a_reader_that_goes_leaves_nothing_in_flight(make: Callable[[], Any], file: int) -> None:
    asked = Asked(make(), file, list(range(0, COUNT, 2)))
    del asked._reader
    gc.collect()
    there = asked.rows.copy()
    time.sleep(0.05)
    np.testing.assert_array_equal(asked.rows, there)


def test_memory_that_is_read_into_stays_until_the_reading_has_ended(make: Callable[[], Any], file: int) -> None:
    class Rows(np.ndarray[Any, np.dtype[np.uint8]]):
        pass

    gone: list[str] = []
    rows = aligned_rows(COUNT, ROW).view(Rows)
    weakref.finalize(rows, gone.append, "rows")
    wanted = Wanted(list(range(COUNT)), list(range(5, COUNT + 5)), PAYLOAD)
    reader = make()
    ticket = reader.submit(file, wanted.places, rows, wanted.heads, PAYLOAD)
    del rows, wanted
    gc.collect()
    if reader.how != "caller":
        assert gone == [], "nothing but the reader holds it"
    assert list(reader.wait(ticket)) == [1] * COUNT
    gc.collect()
    assert gone == ["rows"]


def test_a_request_is_waited_for_once(reader: Any, file: int) -> None:
    asked = Asked(reader, file, [1, 2])
    assert asked.result() == [1, 1]
    with pytest.raises((OSError, KeyError)):
        asked.result()


CHILD = """
import os, sys
from pathlib import Path
import numpy as np
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.storage.record import Wanted
from edgekv.runtime.system.buffers import aligned_rows

kernels = load_kernels("native")
pool = kernels.ThreadPool(3)
reader = kernels.RecordReader(2, sys.argv[2])
stream = kernels.RecordStream(reader, aligned_rows(8, 4096), 4, 2, 2)
file = os.open(sys.argv[1], os.O_RDONLY)
wanted = Wanted(list(range(0, 300, 2)), list(range(5, 305, 2)), 1000)
rows = aligned_rows(150, 4096)
ticket = reader.submit(file, wanted.places, rows, wanted.heads, 1000)
child = os.fork()
if not child:
    try:
        reader.wait(ticket)
    except RuntimeError as error:
        print(error, flush=True)
    del stream, reader, pool  # a child that waited for its parent's reads, or joined its threads, would stay here
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert list(reader.wait(ticket)) == [1] * 150
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("how", [how for kind, how in readers() if kind == "native"])
def test_a_forked_child_leaves_the_reads_of_its_parent_alone(how: str, file: int, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "pages"), how], capture_output=True, text=True, timeout=60
    )
    if f"rows with '{how}'" in run.stderr:
        pytest.skip(f"this system has no {how}")
    assert (run.stdout, run.stderr) == ("a forked process cannot read through the reader of its parent\n", "")


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="telepathy"):
        load_kernels().RecordReader(1, "telepathy")


@pytest.mark.skipif(load_kernels().isa() == "numpy", reason="the native kernels stream")
@pytest.mark.parametrize(
    ("stops", "counts", "pages", "message"),
    [
        ([8, 12], [2, 1], [0, 3, 9], None),
        ([4, 12], [2, 1], [0, 3, 9], "whole runs"),
        ([8, 8], [2, 1], [0, 3, 9], "whole runs"),
        ([8, 12], [5, 0], [0, 1, 2, 3, 4], "capacity"),
        ([8, 12], [2, 1], [0, 9, 10], "in its piece"),
        ([8, 12], [2, 2], [0, 3, 9], "capacity"),
    ],
)
def test_a_plan_that_would_read_beside_its_memory_is_refused(
    stops: list[int], counts: list[int], pages: list[int], message: str | None
) -> None:
    kernels = load_kernels()
    stream = kernels.RecordStream(kernels.RecordReader(2), aligned_rows(8, ROW), 4, 2, 2)
    wanted = Wanted(pages, pages, PAYLOAD)
    arrays = (np.array(stops), np.array(counts), np.array(pages), wanted.places, wanted.heads)
    if message is None:
        stream.plan(1, 0, *arrays, PAYLOAD)
        with pytest.raises(ValueError, match="layer"):
            stream.plan(2, 0, *arrays, PAYLOAD)
    else:
        with pytest.raises(ValueError, match=message):
            stream.plan(1, 0, *arrays, PAYLOAD)


@pytest.mark.skipif(load_kernels().isa() == "numpy", reason="there are no native kernels")
def test_the_kernels_know_the_layout_of_a_record_as_python_does() -> None:
    native: Any = load_kernels()
    assert native.RECORD_LAYOUT == (RECORD_HEAD_BYTES, RECORD_CHECKED_FROM, RECORD_HEADER_BYTES)
