"""The parts of selective attention: guesses that are right in part, sums from the kernel, summaries that grow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekv.errors import CorruptPage
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.pages.bounds import Summaries, summary_bytes
from edgekv.runtime.pages.cache import KVCache
from edgekv.runtime.pages.policy import CacheOptions
from edgekv.runtime.storage.flash import FlashStore
from edgekv.runtime.storage.record import Wanted
from edgekv.runtime.storage.ring import PageReader
from edgekv.settings import AttendOptions, parse_attend
from edgekv.spec import PageSpec

SPEC = PageSpec(1, 2, 32, 16)


def wanted(records: list[int], tags: list[int] | None = None) -> Wanted:
    return Wanted(records, records if tags is None else tags, SPEC.warm_bytes)


def test_a_guess_that_is_right_in_part_is_completed_and_not_read_twice(tmp_path: Path) -> None:
    store = FlashStore(tmp_path, SPEC)
    pages = list(np.random.default_rng(0).integers(0, 256, (20, SPEC.warm_bytes), np.uint8))
    store.write(list(range(20)), pages)
    reader = PageReader(store, SPEC, 8, ring=3)
    reader.request(wanted([2, 3, 4]))
    addresses, rows = reader.take_partly(wanted([3, 4, 9]))
    assert store.counters.records_read == 4
    reader.request(wanted([5, 6]))
    for address, row, expected in zip(addresses.tolist(), rows, (pages[3], pages[4], pages[9]), strict=True):
        assert address == row.ctypes.data + 64
        np.testing.assert_array_equal(row[64 : 64 + SPEC.warm_bytes], expected)
    reader.close()
    store.close()


def test_a_guess_that_fails_is_only_an_error_when_it_is_needed(tmp_path: Path) -> None:
    store = FlashStore(tmp_path, SPEC)
    page = np.zeros(SPEC.warm_bytes, np.uint8)
    store.write([0, 1, 2], [page, page, page])
    reader = PageReader(store, SPEC, 8, ring=3)
    reader.request(wanted([0, 1], [0, 7]))  # record 1 is not page 7
    assert len(reader.take_partly(wanted([2]))[1]) == 1
    reader.request(wanted([0, 1], [0, 7]))
    with pytest.raises(CorruptPage):
        reader.take_partly(wanted([1], [7]))
    reader.close()
    store.close()


@pytest.mark.parametrize("kind", ["auto", "numpy"])
def test_the_kernel_gives_the_logarithm_of_the_softmax_sum(kind: str) -> None:
    kernels = load_kernels(kind)  # type: ignore[arg-type]
    rng = np.random.default_rng(5)
    cache = KVCache(SPEC, CacheOptions(1 << 20, compress_at_seal=False), kernels)
    keys, values = (rng.normal(size=(40, 2, 32)).astype(np.float32) for _ in range(2))
    cache.append(0, keys, values, np.arange(40))
    q, k, v = (rng.normal(size=(3, heads, 32)).astype(np.float32) for heads in (4, 2, 2))
    attention = kernels.Attention(kernels.ThreadPool(2), 4, 2, 32, 16, 0.2)
    out, plain, sums = np.empty_like(q), np.empty_like(q), np.empty((3, 4), np.float32)
    positions, refs = np.arange(40, 43), cache.table.refs[0, :3]
    attention.run(q, k, v, positions, refs, out, log_sum_exp=sums)
    attention.run(q, k, v, positions, refs, plain)
    np.testing.assert_array_equal(out, plain, "asking for the sum changes no bit")
    for token in range(3):
        for head in range(4):
            seen = np.concatenate([keys[:, head // 2], k[: token + 1, head // 2]])
            expected = np.log(np.exp(seen @ q[token, head] * 0.2).sum())
            assert sums[token, head] == pytest.approx(expected, abs=2e-3)


def test_scales_that_grow_keep_every_bound_outside_its_keys() -> None:
    kernels = load_kernels()
    rng = np.random.default_rng(6)
    cache = KVCache(SPEC, CacheOptions(1 << 20), kernels)
    summaries = Summaries(cache.table, kernels)
    keys = (rng.normal(size=(200, 2, 32)) * np.geomspace(0.01, 30, 200)[:, None, None]).astype(np.float32)
    for page in range(12):
        tokens = np.arange(page * 16, page * 16 + 16)
        cache.append(0, keys[tokens], keys[tokens], tokens)
        summaries.add(0, np.array([page]), cache.table.refs[0, page : page + 1])
    decoded, _ = cache.read(0, np.arange(192))
    q = rng.normal(size=(4, 32)).astype(np.float32)
    bounds, likely, _ = summaries.scores(0, q, 12, 1.0)
    for page in range(1, 12):
        inside = decoded[page * 16 : page * 16 + 16]
        best = np.stack([(inside[:, head // 2] @ q[head]).max() for head in range(4)])
        assert (bounds[:, page] >= best).all()
        assert (bounds[:, page] >= likely[:, page]).all()
    assert np.isinf(bounds[:, 0]).all(), "the first page is always attended to"
    assert summaries.nbytes <= summary_bytes(SPEC, cache.table.max_pages)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("exact", AttendOptions()),
        ("selective", AttendOptions(True)),
        ("selective:64", AttendOptions(True, pages=64)),
        ("selective:25%", AttendOptions(True, share=0.25)),
        ("selective:0.01", AttendOptions(True, epsilon=0.01)),
    ],
)
def test_attend_is_read_as_documented(text: str, options: AttendOptions) -> None:
    assert parse_attend(text) == options
