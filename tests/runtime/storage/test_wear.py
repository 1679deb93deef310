"""Wear: what is written to flash is counted, as the OS counts it, and can be limited per day."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from edgekv.errors import StoreError, UsageError, WriteLimit
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.memory_manager import MemoryManager
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.pages.manager import WRITE_BATCH_BYTES
from edgekv.runtime.storage.wear import LEDGER, LINE_BYTES, WearLedger, by_day, bytes_per_day, read_ledger, today
from edgekv.tiers import KVMode

Bundle = Callable[..., Path]
TOKENS: list[int] = np.random.default_rng(5).integers(2, 1000, 1500).tolist()
KIB, MIB = 1024, 1024 * 1024


def generate(folder: Path, count: int, **options: object) -> tuple[list[int], Generator]:
    with Generator.open(folder, RunOptions(kv=KVMode.INT8, threads=2, **options)) as generator:  # type: ignore[arg-type]
        tokens = list(generator.tokens(TOKENS, max_tokens=count))
        generator.report()
        return tokens, generator


def os_written() -> int:
    """Bytes that the OS sent to a block device for this process."""
    return int(Path("/proc/self/io").read_text().split("write_bytes: ")[1].split()[0])


def counts_writes(folder: Path) -> bool:
    """Say whether the OS counts writes to this file system: to one in memory it does not."""
    try:
        before = os_written()
        (folder / "probe").write_bytes(bytes(MIB))
        return os_written() - before >= MIB
    except OSError:
        return False


def test_the_ledger_holds_what_the_os_counted(bundle: Bundle, tmp_path: Path) -> None:
    if not counts_writes(tmp_path):
        pytest.skip("the OS does not count writes to this file system")
    offload = tmp_path / "flash"
    options = RunOptions(kv_budget="25%", kv=KVMode.INT8, threads=2, offload=offload, context=1700)
    with Generator.open(bundle("demo"), options) as generator:
        before = os_written()
        list(generator.tokens(TOKENS, max_tokens=60))
        counted = os_written() - before
        [entry], _ = read_ledger(offload)
        assert generator.report().bytes_written == entry.bytes_written > MIB
    # Beside the pages the process wrote blocks of 4 KiB of the ledger, and what Python keeps of modules that it first loads.
    assert 0 <= counted - entry.bytes_written <= 64 * KIB


def test_a_page_is_written_once_and_in_large_batches(bundle: Bundle, tmp_path: Path) -> None:
    with Generator.open(
        bundle("demo"), RunOptions(kv_budget="24%", kv=KVMode.INT8, threads=2, offload=tmp_path, attend="selective:20%",
                                   context=1700)
    ) as generator:  # fmt: skip
        list(generator.tokens(TOKENS, max_tokens=60))
        cache, store = generator.cache, generator.cache.manager.store  # type: ignore[union-attr]
        assert cache is not None
        assert store is not None
        on_flash = int((cache.table.record >= 0).sum())
        assert cache.manager.counters.pages_offloaded > on_flash, "pages left RAM more than once"
        assert store.counters.records_written == on_flash
    [entry], _ = read_ledger(tmp_path)
    assert entry.bytes_written / entry.batches >= 256 * KIB
    assert entry.bytes_written / entry.batches <= WRITE_BATCH_BYTES


def test_beyond_the_limit_the_run_ends_with_one_line_that_names_it(bundle: Bundle, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgekv", "run", str(bundle("demo")), "--prompt", "It was a dark night. " * 150, "--kv", "int8",
         "--kv-budget", "20%", "--offload", str(tmp_path), "--max-write-per-day", "1500KiB", "--max-tokens", "4"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0
    assert f"{tmp_path} has taken 1" in done.stderr
    assert "would pass --max-write-per-day 1.5 MiB: raise that limit, raise --kv-budget" in done.stderr
    [entry], _ = read_ledger(tmp_path)
    assert 0 < entry.bytes_written <= 1500 * KIB


def test_within_what_fits_ram_the_limit_changes_nothing(bundle: Bundle, tmp_path: Path) -> None:
    expected, _ = generate(bundle("demo"), 40)
    said, generator = generate(bundle("demo"), 40, offload=tmp_path, kv_budget="400%", max_write_per_day=1)
    assert said == expected
    assert not (tmp_path / LEDGER).exists()
    assert generator.stats.bytes_written == 0


def test_beyond_the_limit_pages_are_dropped_where_that_is_allowed(bundle: Bundle, tmp_path: Path) -> None:
    _, generator = generate(
        bundle("demo"), 20, offload=tmp_path, kv_budget="20%", max_write_per_day="1500KiB", allow_drop=True
    )
    pages = generator.stats.pages
    assert pages is not None
    assert pages.pages_dropped > 0
    assert pages.pages_held_back > 0
    [entry], _ = read_ledger(tmp_path)
    assert 0 < entry.bytes_written <= 1500 * KIB


def test_pages_that_are_on_flash_already_leave_ram_beyond_the_limit(tmp_path: Path) -> None:
    shape = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 32}
    random = np.random.default_rng(0)
    with MemoryManager(1, offload_dir=tmp_path, max_write_per_day=16 * 8 * KIB) as manager:
        manager.initialize_kv_cache(shape)
        keys, values = random.uniform(-1, 1, (2, 16 * 8, 2, 32)).astype(np.float32)
        manager.add_to_kv_cache(layer_idx=0, key=keys, value=values, token_indices=range(128))
        manager.compress_pages(8)
        assert manager.offload_pages(8) == 8
        before, _ = manager.get_from_kv_cache(layer_idx=0, token_indices=range(128))
        with WearLedger(tmp_path) as other:
            other.reserve(16 * 8 * KIB)  # another process uses up what is left
        manager.add_to_kv_cache(layer_idx=0, key=keys, value=values, token_indices=range(128, 256))
        manager.compress_pages(8)
        assert manager.offload_pages(12) == 8, "the clean ones"
        with pytest.raises(WriteLimit):
            manager.offload_pages(1)
        after, _ = manager.get_from_kv_cache(layer_idx=0, token_indices=range(128))
        np.testing.assert_array_equal(before, after)
        manager.cache.check()


def test_a_session_is_not_saved_beyond_the_limit_and_says_so(bundle: Bundle, tmp_path: Path) -> None:
    options = RunOptions(threads=2, session=SessionOptions(tmp_path / "a.kv"), max_write_per_day=MIB, context=1700)
    generator = Generator.open(bundle("demo"), options)
    said = list(generator.tokens(TOKENS, max_tokens=10))
    assert len(said) == 10
    with pytest.raises(StoreError, match=r"the session was not saved: .* would pass --max-write-per-day"):
        generator.close()
    entries, _ = read_ledger(tmp_path / "a.kv")
    assert sum(entry.bytes_written for entry in entries) <= MIB


# -- the file -----------------------------------------------------------------------------------------------------


def write_much(folder: Path) -> None:
    with WearLedger(folder) as ledger:
        for _ in range(200):
            ledger.reserve(1000)


def test_several_processes_share_a_ledger(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_much, args=(tmp_path,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    entries, damaged = read_ledger(tmp_path)
    assert [(entry.bytes_written, entry.batches) for entry in entries] == [(200_000, 200)] * 4
    assert damaged == 0
    assert (tmp_path / LEDGER).stat().st_size == 4 * LINE_BYTES


def test_a_killed_run_leaves_all_that_it_counted(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from edgekv.runtime.storage.wear import WearLedger\n"
        "ledger = WearLedger(Path(sys.argv[1]))\n"
        "while True: ledger.reserve(1000); print('x', flush=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    said = sum(len(child.stdout.read(2)) // 2 for _ in range(300))
    os.kill(child.pid, signal.SIGKILL)
    said += len(child.stdout.read()) // 2
    child.wait()
    [entry], damaged = read_ledger(tmp_path)
    assert said <= entry.batches <= said + 1
    assert damaged == 0


def test_the_limit_counts_all_runs_of_today_and_none_of_yesterday(tmp_path: Path) -> None:
    for day, count in ((today() - timedelta(days=1), 900), (today(), 600)):
        line = {"day": day.isoformat(), "run": "earlier", "bytes": count, "batches": 1}
        with (tmp_path / LEDGER).open("a") as file:
            file.write(json.dumps(line).ljust(LINE_BYTES - 1) + "\n")
    with WearLedger(tmp_path, 1000) as ledger:
        ledger.reserve(400)
        with pytest.raises(
            WriteLimit, match=r"has taken 1000 B today, and the next 1 B would pass --max-write-per-day"
        ):
            ledger.reserve(1)
    entries, _ = read_ledger(tmp_path)
    assert [day.bytes_written for day in by_day(entries)] == [900, 1000]
    assert bytes_per_day(by_day(entries)) == 950


def test_a_damaged_line_is_counted_as_such_and_the_next_run_does_not_share_it(tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_bytes(b"\0" * 100)
    with WearLedger(tmp_path) as ledger:
        ledger.reserve(5)
    entries, damaged = read_ledger(tmp_path)
    assert [entry.bytes_written for entry in entries] == [5]
    assert damaged == 1


def test_a_damaged_line_that_may_be_of_today_stops_writes_that_are_limited(tmp_path: Path) -> None:
    ledger_file = tmp_path / LEDGER
    with WearLedger(tmp_path, 5000) as ledger:
        ledger.reserve(4000)
    damaged = b"\xffjunk" + ledger_file.read_bytes()[5:]
    ledger_file.write_bytes(damaged)
    with WearLedger(tmp_path, 5000) as ledger, pytest.raises(WriteLimit, match=r"1 damaged lines .* may be of today"):
        ledger.reserve(1)
    assert ledger_file.read_bytes() == damaged
    yesterday = time.time() - 24 * 3600
    os.utime(ledger_file, (yesterday, yesterday))  # nothing was written today
    for _ in range(2):
        with WearLedger(tmp_path, 5000) as ledger:
            ledger.reserve(1)
            ledger.reserve(1)
    assert [day.bytes_written for day in by_day(read_ledger(tmp_path)[0])] == [0, 4]


def test_a_damaged_line_before_one_of_yesterday_is_none_of_today(tmp_path: Path) -> None:
    line = {"day": (today() - timedelta(days=1)).isoformat(), "run": "0" * 12, "bytes": 7, "batches": 1}
    text = json.dumps(line).encode().ljust(LINE_BYTES - 1) + b"\n"
    (tmp_path / LEDGER).write_bytes(b"\0" * LINE_BYTES + text)
    with WearLedger(tmp_path, 10) as ledger:
        ledger.reserve(9)
    assert read_ledger(tmp_path)[1] == 1


# -- edgekv stats -------------------------------------------------------------------------------------------------


def stats(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgekv", "stats", *arguments], capture_output=True, text=True, check=False
    )


def test_stats_project_the_years_of_life_from_the_profile(tmp_path: Path) -> None:
    with WearLedger(tmp_path) as ledger:
        ledger.reserve(10**9)
    facts = json.loads(stats(str(tmp_path), "--profile", "android-low-4gb", "--json").stdout)
    assert facts["bytes_written"] == 10**9
    assert facts["days"][0]["runs"] == 1
    from edgekv import device_profiles

    flash = device_profiles.load("android-low-4gb").flash
    expected = flash.endurance_tbw.value * 1e12 / (1e9 * flash.write_amplification.value) / 365.25
    assert facts["years_of_life"] == pytest.approx(expected)
    text = stats(str(tmp_path), "--profile", "android-low-4gb").stdout
    assert "953.7 MiB in all" in text
    assert f"last {expected:.1f} years at this rate" in text


def test_stats_of_a_folder_without_a_ledger_say_how_to_get_one(tmp_path: Path) -> None:
    done = stats(str(tmp_path))
    assert done.returncode == 2
    assert "no wear ledger" in done.stderr
    with pytest.raises(UsageError):
        read_ledger(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_ledger_that_is_a_pipe_or_a_link_is_refused_and_not_waited_for(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    make(tmp_path / LEDGER)
    with pytest.raises(UsageError, match=r"no wear ledger .*wear.jsonl \(it is (not a file|a link)"):
        read_ledger(tmp_path)
