"""Sweeps: every case once, whatever interrupts them; the same table from CSV and Parquet."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekv.device_profiles import names
from edgekv.emulator.play.shape_app import Shape, read_shape
from edgekv.emulator.sweep.html import to_html
from edgekv.emulator.sweep.sweep import OUTCOME, all_cases, run_case, sweep
from edgekv.emulator.sweep.table import read_rows, write_rows
from edgekv.errors import UsageError


@pytest.fixture
def shape(config: Path) -> Shape:
    return read_shape(config)


def test_a_sweep_that_was_killed_goes_on_where_it_was(config: Path, shape: Shape, tmp_path: Path) -> None:
    out = tmp_path / "sweep.csv"
    journal = tmp_path / "sweep.csv.partial"
    lists = [
        "--contexts",
        "1024,2048",
        "--policies",
        "lru,heavy,window",
        "--budgets",
        "device,4MiB",
        "-n",
        "200",
    ]
    command = [sys.executable, "-m", "edgekv", "sweep", str(config), "--profiles", "android-low-4gb", *lists]
    command += ["--workers", "1", "--out", str(out)]
    first = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while first.poll() is None and not (journal.exists() and journal.read_text(encoding="utf-8").count("\n") >= 2):
            time.sleep(0.02)
        assert first.poll() is None, "it was done before it could be killed"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    held = journal.read_text(encoding="utf-8").count("\n")
    with journal.open("a", encoding="utf-8") as stream:
        stream.write('{"key": "cut sho')
    assert 2 <= held < 12
    assert not out.exists()
    second = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert f"12 cases, {held} of them done before" in second.stderr.replace("\n", " ")
    rows = json.loads(second.stdout)
    assert len({row["key"] for row in rows}) == 12
    assert not journal.exists()
    cases = all_cases(
        ["android-low-4gb"],
        [1024, 2048],
        ["lru", "heavy", "window"],
        ["device", "4MiB"],
        ["exact"],
        max_tokens=200,
        seed=0,
    )
    assert rows[7] == run_case(shape, cases[7])  # a worker's row is that of a plain call


def test_ctrl_c_in_a_terminal_ends_a_sweep_and_its_workers_in_one_line(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgekv", "sweep", str(config), "--profiles", "all", "--contexts", "2048,4096"]
    command += ["--workers", "1", "-n", "400", "--out", str(tmp_path / "sweep.csv")]
    with subprocess.Popen(command, start_new_session=True, stdout=-1, stderr=-1, text=True) as process:
        journal = tmp_path / "sweep.csv.partial"
        while process.poll() is None and not (journal.exists() and journal.read_text(encoding="utf-8")):
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        assert process.communicate() == ("", "edgekv: interrupted\n")
    assert process.returncode == 130


def test_a_table_comes_back_as_it_was_written(shape: Shape, tmp_path: Path) -> None:
    cases = all_cases(["android-low-4gb"], [512], ["lru"], ["device", "1KiB"], ["exact"], max_tokens=8, seed=0)
    rows = [run_case(shape, case) for case in cases]
    assert rows[0]["error"] is None
    assert "too small" in rows[1]["error"]
    for name in ("table.csv", "table.parquet"):
        write_rows(tmp_path / name, rows)
        assert read_rows(tmp_path / name) == rows
        # Nothing is missing, so no cluster starts.
        assert sweep(shape, cases, tmp_path / name) == rows
    assert "android-low-4gb" in to_html("two cases", rows)


def test_a_table_keeps_the_rows_of_other_sweeps(shape: Shape, tmp_path: Path) -> None:
    out, more = tmp_path / "table.csv", {"max_tokens": 8, "seed": 0}
    first, second = (
        all_cases(["raspberry-pi-5-8gb", "raspberry-pi-5-8gb"], contexts, ["lru"], ["device"], ["exact"], **more)
        for contexts in ([512], [256, 256, 512])
    )
    assert (len(first), len(second)) == (1, 2), "what is named twice is run once"
    sweep(shape, second, out, workers=1)
    whole = read_rows(out)
    again = sweep(shape, first, out, workers=1, progress=lambda done, total: None)
    assert again == [row for row in whole if row["context"] == 512]
    assert sorted(read_rows(out), key=lambda row: row["context"]) == whole


def test_a_table_of_something_else_is_never_overwritten(shape: Shape, tmp_path: Path) -> None:
    cases = all_cases(["android-low-4gb"], [512], ["lru"], ["device"], ["exact"], max_tokens=8, seed=0)
    other = tmp_path / "other.csv"
    with other.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["a", "b"], ["1", "2"]])
    with pytest.raises(UsageError, match="not a table of a sweep"):
        sweep(shape, cases, other)
    with pytest.raises(UsageError, match="must end in"):
        sweep(shape, cases, tmp_path / "sweep.xlsx")


@contextlib.contextmanager
def dask(part: str, address: Path, *arguments: str) -> Iterator[None]:
    """A scheduler or a worker in a process of its own, as on a cluster; ``address``: where the scheduler says it is."""
    command = [sys.executable, "-m", f"distributed.cli.dask_{part}", "--scheduler-file", str(address), "--no-dashboard"]
    process = subprocess.Popen(
        [*command, *arguments], cwd=address.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not address.exists():
            assert process.poll() is None, f"the {part} does not start"
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Path]:
    address = tmp_path / "scheduler.json"
    with dask("scheduler", address, "--host", "127.0.0.1", "--port", "0"):
        yield address


def test_a_sweep_on_a_cluster_gives_the_table_of_this_machine(
    scheduler: Path, config: Path, shape: Shape, tmp_path: Path
) -> None:
    lists = ["--profiles", "android-low-4gb", "--contexts", "512,1024", "--policies", "lru,random", "-n", "8"]
    command = [sys.executable, "-m", "edgekv", "sweep", str(config), *lists, "--out", str(tmp_path / "sweep.csv")]
    with dask("worker", scheduler, "--nthreads", "1", "--no-nanny"):
        done = subprocess.run(
            [*command, "--scheduler", listens_at(scheduler), "--json"], capture_output=True, text=True, check=True
        )
    cases = all_cases(["android-low-4gb"], [512, 1024], ["lru", "random"], ["device"], ["exact"], max_tokens=8, seed=0)
    assert json.loads(done.stdout) == [run_case(shape, case) for case in cases]


def test_a_cluster_that_cannot_work_is_named(
    scheduler: Path, shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekv.emulator.sweep.sweep.ANSWER_S", 0.5)
    cases = all_cases(["android-low-4gb"], [512], ["lru"], ["device"], ["exact"], max_tokens=8, seed=0)
    with pytest.raises(UsageError, match=r"has no workers; start some with: dask worker tcp://127.0.0.1:\d+"):
        sweep(shape, cases, tmp_path / "sweep.csv", scheduler=listens_at(scheduler))
    with socket.socket() as taken:  # bound and not listening: nobody else answers there
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"no dask scheduler answers at {address}"):
            sweep(shape, cases, tmp_path / "sweep.csv", scheduler=address)


def listens_at(scheduler: Path) -> str:
    address: str = json.loads(scheduler.read_text(encoding="utf-8"))["address"]
    return address


def test_a_case_that_fails_is_a_row_of_its_own_and_the_sweep_goes_on(shape: Shape, tmp_path: Path) -> None:
    broken = dataclasses.replace(shape, page_size=0)  # what no reader lets through
    cases = all_cases(["android-low-4gb"], [512], ["lru"], ["device"], ["exact"], max_tokens=8, seed=0)
    row = run_case(broken, cases[0])
    assert row["error"]
    assert row["ttft_s"] is None
    attends = ["selective:25%", "exact"]
    cases = all_cases(["android-low-4gb"], [1024], ["lru"], ["4MiB"], attends, max_tokens=8, seed=0)
    rows = sweep(shape, cases, tmp_path / "sweep.csv", workers=1)
    assert [row["error"] for row in rows] == [None, None]


def test_every_line_of_a_page_looks_different_and_the_title_says_what_ran(shape: Shape) -> None:
    cases = all_cases(names(), [512, 1024, 1040], ["lru", "heavy"], ["device"], ["exact"], max_tokens=16, seed=0)
    rows = [
        {**dataclasses.asdict(case), **dict.fromkeys(OUTCOME, 1.0), "peak_bytes": 1, "bytes_written": 1, "error": None}
        for case in cases
    ]
    page = to_html("tiny.json", rows)
    assert f"<h1>tiny.json on {len(names())} devices</h1>" in page
    assert (
        f"{len(cases)} cases; 512, 1,024, 1,040 tokens of context; lru, heavy; the KV budget that the device leaves"
        in page
    )
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    chart = json.loads(found[1])["decode"]
    looks = {(line["line"]["color"], line["line"]["dash"], line["marker"]["symbol"]) for line in chart["data"]}
    assert len(looks) == len(chart["data"]) == 2 * len(names())
    assert chart["layout"]["xaxis"]["ticktext"] == ["512", "1,040"], "1,024 would be printed over 1,040"
