"""The flash tier: what was written comes back or is refused, whatever happens to the file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.errors import CorruptPage, StoreError, StoreFull, StoreLocked
from edgekv.runtime.storage.flash import FlashStore
from edgekv.runtime.system.buffers import aligned_rows
from edgekv.spec import RECORD_HEADER_BYTES, PageSpec

SPEC = PageSpec(2, 2, 32, 16)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FlashStore]:
    store = FlashStore(tmp_path, SPEC)
    yield store
    store.close()


def pages(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, SPEC.warm_bytes), np.uint8))


def read(store: FlashStore, records: list[int], tags: list[int]) -> np.ndarray:
    out = aligned_rows(len(records), SPEC.record_bytes)
    store.read(records, tags, out)
    return out[:, RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + SPEC.warm_bytes]


def test_records_come_back_as_they_were_written_in_any_order(store: FlashStore) -> None:
    written = pages(9)
    records = store.write(list(range(9)), written)
    order = [8, 0, 3, 4, 5, 1]
    np.testing.assert_array_equal(
        read(store, [records[i] for i in order], order), np.stack([written[i] for i in order])
    )


def test_freed_records_are_used_again(store: FlashStore) -> None:
    records = store.write([0, 1, 2], pages(3))
    for record in records:
        store.free(record)
    assert store.write([3, 4], pages(2)) == records[:2]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, RECORD_HEADER_BYTES + SPEC.warm_bytes - 1), st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_record_is_found(position: int, bit: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = FlashStore(Path(folder), SPEC)
        try:
            [record] = store.write([5], pages(1))
            at = record * SPEC.record_bytes + position
            [byte] = os.pread(store.file.handle, 1, at)
            os.pwrite(store.file.handle, bytes([byte ^ 1 << bit]), at)
            with pytest.raises(CorruptPage, match="differs from its checksum"):
                read(store, [record], [5])
        finally:
            store.close()


def test_no_byte_of_a_record_can_change_unseen(tmp_path: Path) -> None:
    """Every byte of a small record, the padding included: what is read is refused, or it is what was written."""
    spec = PageSpec(1, 1, 8, 4)
    store = FlashStore(tmp_path, spec)
    page = np.random.default_rng(0).integers(0, 256, spec.warm_bytes, np.uint8)
    [record] = store.write([5], [page])
    out, refused = aligned_rows(1, spec.record_bytes), 0
    for at in range(spec.record_bytes):
        [byte] = os.pread(store.file.handle, 1, at)
        os.pwrite(store.file.handle, bytes([byte ^ 1 << at % 8]), at)
        try:
            store.read([record], [5], out)
            np.testing.assert_array_equal(out[0, RECORD_HEADER_BYTES:][: spec.warm_bytes], page)
        except CorruptPage:
            refused += 1
        os.pwrite(store.file.handle, bytes([byte]), at)
    assert refused == RECORD_HEADER_BYTES + spec.warm_bytes
    store.close()


def test_a_record_in_the_place_of_another_is_refused(store: FlashStore) -> None:
    first, second = store.write([1, 2], pages(2))
    size = SPEC.record_bytes
    bytes_of_second = os.pread(store.file.handle, size, second * size)
    os.pwrite(store.file.handle, bytes_of_second, first * size)
    with pytest.raises(CorruptPage):
        read(store, [first], [1])
    read(store, [second], [2])


def test_a_record_read_as_another_page_is_refused(store: FlashStore) -> None:
    [record] = store.write([1], pages(1))
    with pytest.raises(CorruptPage):
        read(store, [record], [7])


def test_a_truncated_file_is_found_and_the_rest_is_still_read(store: FlashStore) -> None:
    records = store.write([0, 1], pages(2))
    os.ftruncate(store.file.handle, SPEC.record_bytes + 100)
    read(store, records[:1], [0])
    with pytest.raises(CorruptPage, match="shorter than what was written"):
        read(store, records[1:], [1])


def test_nothing_is_left_in_the_folder_but_the_lock(tmp_path: Path) -> None:
    store = FlashStore(tmp_path, SPEC)
    store.write([0], pages(1))
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    store.close()


def test_a_second_process_is_told_who_has_the_folder(tmp_path: Path) -> None:
    store = FlashStore(tmp_path, SPEC)
    code = (
        "import sys; from pathlib import Path; from edgekv.spec import PageSpec\n"
        "from edgekv.runtime.storage.flash import FlashStore\n"
        "from edgekv.errors import StoreLocked\n"
        "try: FlashStore(Path(sys.argv[1]), PageSpec(2, 2, 32, 16))\n"
        "except StoreLocked as error: print(error); sys.exit(2)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"another process uses the offload folder {tmp_path}" in result.stdout
    store.close()
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="cannot write the offload folder"):
        FlashStore(tmp_path / "file" / "inside", SPEC)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_FSIZE as a full disk")
def test_a_full_disk_leaves_every_page_with_its_owner(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, numpy as np; from pathlib import Path\n"
        "from edgekv.runtime.storage.flash import FlashStore; from edgekv.spec import PageSpec\n"
        "from edgekv.errors import StoreFull\n"
        "spec = PageSpec(2, 2, 32, 16); store = FlashStore(Path(sys.argv[1]), spec)\n"
        "good = np.ones(spec.warm_bytes, np.uint8); [record] = store.write([0], [good])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2 * spec.record_bytes, resource.RLIM_INFINITY))\n"
        "try: store.write([1, 2, 3], [good] * 3)\n"
        "except StoreFull as error: print(error)\n"
        "out = np.zeros((1, spec.record_bytes), np.uint8); store.read([record], [0], out)\n"
        "assert (out[0, 64:][: spec.warm_bytes] == 1).all()\n"
        "print(store.write([4], [good]))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "is full; free some space" in result.stdout
    assert "[1]" in result.stdout, "the records of the failed batch are free again"


def test_errors_of_the_store_share_a_base() -> None:
    assert all(issubclass(error, StoreError) for error in (StoreFull, StoreLocked, CorruptPage))
