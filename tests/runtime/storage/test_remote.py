"""The object store below flash: pages come back as they were or not at all, in batched objects that the run removes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import obstore
import pytest

from edgekv.errors import CorruptPage, EngineMissing, StoreError, UsageError
from edgekv.runtime.options import RunOptions
from edgekv.runtime.storage.cipher import Cipher
from edgekv.runtime.storage.flash import FlashStore
from edgekv.runtime.storage.layered import LayeredStore
from edgekv.runtime.storage.objects import list_runs, open_objects
from edgekv.runtime.storage.open import open_offload
from edgekv.runtime.storage.remote import PART_BYTES, ObjectStore
from edgekv.runtime.system.buffers import aligned_rows
from edgekv.spec import RECORD_HEADER_BYTES, PageSpec
from edgekv.tiers import Tier
from tests.runtime.storage.conftest import S3Server, Wire

SPEC = PageSpec(2, 2, 32, 16)
MANY = PART_BYTES // SPEC.record_bytes


def pages(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, SPEC.warm_bytes), np.uint8))


def read(store: ObjectStore | LayeredStore, records: list[int], tags: list[int]) -> np.ndarray:
    out = aligned_rows(len(records), SPEC.record_bytes)
    store.read(records, tags, out)
    return out[:, RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + SPEC.warm_bytes]


def names(store: ObjectStore) -> list[str]:
    listed = [entry["path"] for batch in obstore.list(store._store, f"{store.run}/") for entry in batch]
    return sorted(path for path in listed if path.endswith(".pages"))


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return "s3://kv-cache/some/prefix"
    return "memory://" if request.param == "memory" else f"file://{tmp_path}/objects"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectStore]:
    store = ObjectStore(f"file://{tmp_path}/objects", SPEC)
    yield store
    store.close()


def test_pages_come_back_as_they_were_written_in_any_order(url: str) -> None:
    store = ObjectStore(url, SPEC)
    count = 3 * MANY + 5
    written = pages(count)
    records = [record for start in range(0, count, 7) for record in
               store.write(list(range(start, min(start + 7, count))), written[start : start + 7])]  # fmt: skip
    for order in (list(range(count)), np.random.default_rng(1).permutation(count)[:40].tolist(), [count - 1, 0, 1, 9]):
        got = read(store, [records[index] for index in order], order)
        np.testing.assert_array_equal(got, np.stack([written[index] for index in order]))
    assert store.tier(records[0]) == Tier.REMOTE
    store.close()


def test_objects_hold_many_pages_and_what_is_too_little_waits_in_ram(store: ObjectStore) -> None:
    for page in range(MANY - 1):
        store.write([page], pages(1, page))
    assert names(store) == [], "nothing was worth a request yet"
    np.testing.assert_array_equal(read(store, [3], [3])[0], pages(1, 3)[0])
    store.write([MANY - 1], pages(1))
    [name] = names(store)
    assert obstore.head(store._store, name)["size"] == PART_BYTES
    assert (store.counters.objects_written, store.counters.remote_bytes_written) == (1, PART_BYTES)
    assert store.counters.bytes_written == 0, "nothing went to flash"


def test_an_object_goes_when_its_last_page_is_freed_and_all_go_with_the_run(store: ObjectStore) -> None:
    first = store.write(list(range(MANY)), pages(MANY))
    store.write(list(range(MANY)), pages(MANY))
    for record in first:
        store.free(record)
    store._threads.shutdown()  # let deletions finish
    assert len(names(store)) == 1
    assert [run.name for run in list_runs(store.url)] == [store.run]
    store.close()
    assert list_runs(store.url) == []


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE as a full disk")
def test_a_store_that_takes_no_more_gives_back_what_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import resource

    store = ObjectStore(f"file://{tmp_path}/objects", SPEC, patience_s=2.0)
    store.write(list(range(MANY)), pages(MANY))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
    try:
        with pytest.raises(StoreError, match="cannot write to file://"):
            store.write(list(range(MANY)), pages(MANY))
        store.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path for path in (tmp_path / "objects").rglob("*") if path.is_file()] == []
    assert caplog.records == []


def test_pages_freed_while_they_wait_do_not_keep_an_object(store: ObjectStore) -> None:
    waiting = store.write([0, 1], pages(2))
    for record in waiting:
        store.free(record)
    rest = store.write(list(range(2, MANY)), pages(MANY - 2))
    np.testing.assert_array_equal(read(store, rest[:1], [2])[0], pages(MANY - 2)[0])
    for record in rest:
        store.free(record)
    store._threads.shutdown()
    assert names(store) == []


@pytest.mark.parametrize("damage", ["flipped", "truncated", "swapped"])
def test_a_damaged_object_is_refused(damage: str, url: str) -> None:
    store = ObjectStore(url, SPEC)
    records = [record for seed in range(2) for record in store.write(list(range(MANY)), pages(MANY, seed))]
    held = names(store)
    first, second = (bytearray(obstore.get(store._store, name).bytes()) for name in held)
    changed = {
        "flipped": first[:99] + bytes([first[99] ^ 16]) + first[100:],
        "truncated": first[:100],
        "swapped": second,
    }
    obstore.put(store._store, held[0], bytes(changed[damage]))
    with pytest.raises(CorruptPage, match=r"(?s)differs from its checksums.*was not used"):
        read(store, records[:1], [0])
    np.testing.assert_array_equal(read(store, records[MANY : MANY + 1], [0])[0], pages(MANY, 1)[0])
    store.close()


def test_a_page_read_as_another_is_refused(store: ObjectStore) -> None:
    records = store.write(list(range(MANY)), pages(MANY))
    with pytest.raises(CorruptPage):
        read(store, records[:1], [1])


def test_an_object_that_is_gone_is_named(store: ObjectStore) -> None:
    records = store.write(list(range(MANY)), pages(MANY))
    obstore.delete(store._store, names(store))
    with pytest.raises(StoreError, match="an object or the bucket is gone"):
        read(store, records[:1], [0])


def test_what_was_damaged_on_the_way_is_read_again(wire: Wire) -> None:
    store = ObjectStore("s3://kv-cache/wire", SPEC)
    records = store.write(list(range(MANY)), pages(MANY))
    wire.flips = 1
    np.testing.assert_array_equal(read(store, records, list(range(MANY))), np.stack(pages(MANY)))
    assert store.counters.records_reread == MANY
    wire.flips = 1000
    with pytest.raises(CorruptPage):
        read(store, records, list(range(MANY)))
    wire.flips = 0
    store.close()


def test_a_read_that_fails_leaves_nobody_writing_into_its_memory(wire: Wire) -> None:
    """The memory is used for the next read at once: a late answer in it would be another page's keys."""
    store = ObjectStore("s3://kv-cache/late", SPEC)
    records = [r for seed in range(6) for r in store.write(list(range(MANY)), pages(MANY, seed))]
    obstore.delete(store._store, names(store)[:1])
    wire.delay_s = 0.05
    out = aligned_rows(len(records), SPEC.record_bytes)
    with pytest.raises(StoreError):
        store.read(records, list(range(MANY)) * 6, out)
    out[:] = 7
    threading.Event().wait(0.5)
    assert (out == 7).all()
    wire.delay_s = 0.0
    store.close()


def test_an_encrypted_object_shows_nothing_and_a_moved_record_does_not_decrypt(tmp_path: Path) -> None:
    store = ObjectStore(f"file://{tmp_path}/objects", SPEC, cipher=Cipher.ephemeral())
    page = np.full(SPEC.warm_bytes, 65, np.uint8)
    records = store.write(list(range(MANY)), [page] * MANY)
    assert b"A" * 16 not in bytes(obstore.get(store._store, names(store)[0]).bytes())
    np.testing.assert_array_equal(read(store, records[5:6], [5])[0], page)
    store.close()


def test_a_store_that_cannot_be_reached_is_said_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with pytest.raises(StoreError, match=r"cannot write to s3://kv-cache/none: .*after [1-9][0-9]* retries"):
        ObjectStore("s3://kv-cache/none", SPEC, patience_s=1.0)


def test_wrong_credentials_are_said(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="403 Forbidden"):
        ObjectStore("s3://kv-cache/x", SPEC)


def test_flash_takes_pages_up_to_its_limit_and_the_object_store_the_rest(tmp_path: Path) -> None:
    flash, remote = FlashStore(tmp_path / "flash", SPEC), ObjectStore(f"file://{tmp_path}/objects", SPEC)
    store = LayeredStore(flash, remote, 5)
    written = pages(12)
    records = store.write(list(range(3)), written[:3]) + store.write(list(range(3, 12)), written[3:])
    assert [store.tier(record) for record in records] == [Tier.COLD] * 5 + [Tier.REMOTE] * 7
    order = [11, 2, 3, 4, 5, 6, 0]
    np.testing.assert_array_equal(
        read(store, [records[i] for i in order], order), np.stack([written[i] for i in order])
    )
    store.free(records[0])
    assert store.tier(store.write([12], pages(1))[0]) == Tier.COLD, "room on flash is used again"
    assert store.counters.bytes_written == 6 * SPEC.record_bytes
    store.close()


def test_when_flash_takes_no_more_today_pages_go_on_to_the_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = RunOptions(
        offload=f"file://{tmp_path}/objects", flash_limit="1MiB", max_write_per_day=8 * SPEC.record_bytes
    )
    store = open_offload(options.storage, SPEC)
    assert isinstance(store, LayeredStore)
    written = pages(30)
    records = [r for at in range(0, 30, 5) for r in store.write(list(range(at, at + 5)), written[at : at + 5])]
    assert [store.tier(record) for record in records] == [Tier.COLD] * 5 + [Tier.REMOTE] * 25
    np.testing.assert_array_equal(read(store, records, list(range(30))), np.stack(written))
    store.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "ftp://there"}, "the URL of an object store: s3://, gs://"),
        ({"flash_limit": "1MiB"}, "give --offload URL with it"),
        ({"offload": "memory://", "flash_limit": "much"}, "flash_limit must be a size"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_offload(RunOptions(**options).storage, SPEC)  # type: ignore[arg-type]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(EngineMissing, match=r"pip install 'edgekv\[cloud\]'"):
        open_objects("memory://", 1.0)
