"""Sweeps: every case once, whatever interrupts them; the same table from CSV and Parquet."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekv.device_profiles import load, names, user_dir
from edgekv.emulator.play.shape_app import Shape, read_shape
from edgekv.emulator.sweep.case import COLUMNS, MODEL, OUTCOME, Case, all_cases, run_case
from edgekv.emulator.sweep.html import to_html
from edgekv.emulator.sweep.sweep import sweep
from edgekv.emulator.sweep.table import read_rows, write_rows
from edgekv.errors import EdgeKVError, StoreLocked, UsageError


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


def children(process: subprocess.Popen[str], word: str) -> list[int]:
    """The processes that it started whose command line has this word."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
    return [int(pid) for pid in listed if word in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")]


def ended(pid: int) -> bool:
    """Say whether a process is gone, or waits for nothing but that its end is noticed."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return True


@contextlib.contextmanager
def long_sweep(config: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A sweep that has done its first case, and the id of its worker."""
    out = folder / "sweep.csv"
    (folder / "tmp").mkdir(exist_ok=True)
    lists = ["--profiles", "all", "--contexts", "2048,4096", "--workers", "1", "-n", "400"]
    command = [sys.executable, "-m", "edgekv", "sweep", str(config), *lists, "--out", str(out)]
    env = {**os.environ, "TMPDIR": str(folder / "tmp")}
    with subprocess.Popen(command, start_new_session=True, stdout=-1, stderr=-1, text=True, env=env) as process:
        journal = folder / "sweep.csv.partial"
        try:
            while not (journal.exists() and journal.stat().st_size):
                assert process.poll() is None, process.communicate()
                time.sleep(0.02)
            (worker,) = children(process, "spawn_main")
            yield process, worker
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says who is whose child")
@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM")])
def test_a_sweep_that_is_interrupted_waits_for_no_worker(
    config: Path, tmp_path: Path, number: signal.Signals, said: str
) -> None:
    with long_sweep(config, tmp_path) as (process, worker):
        os.kill(worker, signal.SIGSTOP)  # it would never answer
        process.send_signal(number)
        assert process.communicate() == ("", f"edgekv: {said}\n")
        assert process.returncode == 128 + number
        assert ended(worker)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says who is whose child")
def test_a_worker_that_is_killed_ends_the_sweep_in_one_line_and_never_hangs_it(config: Path, tmp_path: Path) -> None:
    with long_sweep(config, tmp_path) as (process, worker):
        os.kill(worker, signal.SIGKILL)
        out, line = process.communicate()
    assert process.returncode == 1
    assert line.startswith("edgekv: a process of the sweep was killed by SIGKILL; give the command again, with fewer")
    assert (out, line.count("\n")) == ("", 1)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says who is whose child")
def test_a_worker_ends_with_a_sweep_that_is_killed(config: Path, tmp_path: Path) -> None:
    with long_sweep(config, tmp_path) as (process, worker):
        process.kill()
        process.wait()
        while not ended(worker):  # or the test runs out of time
            time.sleep(0.02)


def test_a_table_comes_back_as_it_was_written(shape: Shape, tmp_path: Path) -> None:
    cases = all_cases(["android-low-4gb"], [512], ["lru"], ["device", "1KiB"], ["exact"], max_tokens=8, seed=0)
    rows = [run_case(shape, case) for case in cases]
    assert rows[0]["error"] is None
    assert "too small" in rows[1]["error"]
    for name in ("table.csv", "table.parquet"):
        write_rows(tmp_path / name, rows)
        assert read_rows(tmp_path / name) == rows
        # Nothing is missing, so no process starts.
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


def pi(folder: Path, gb_per_s: float, name: str = "my-pi") -> str:
    """Write a profile, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.toml"
    rate = f'weight_read_bytes_per_s = {{ value = {gb_per_s}e9, confidence = "low", source = "a guess" }}'
    about = f'name = "{name}"\ntitle = "mine"\nextends = "raspberry-pi-5-8gb"'
    path.write_text(f"{about}\n[compute.onnx]\n{rate}\n[compute.onnx.int4]\n{rate}\n", encoding="utf-8")
    return str(path)


def one_case(profile: str = "android-low-4gb", context: int = 512) -> list[Case]:
    return all_cases([profile], [context], ["lru"], ["device"], ["exact"], max_tokens=8, seed=0)


def test_a_row_is_of_what_a_profile_says_and_not_of_its_name(shape: Shape, tmp_path: Path) -> None:
    out = tmp_path / "sweep.csv"
    pi(user_dir(), 20)
    try:
        (fast,) = sweep(shape, one_case("my-pi"), out, workers=1)
        pi(user_dir(), 1)
        (slow,) = sweep(shape, one_case("my-pi"), out, workers=1)
    finally:
        (user_dir() / "my-pi.toml").unlink()
    assert slow == run_case(shape, one_case(pi(tmp_path, 1))[0])
    assert slow["decode_tokens_per_s"] < fast["decode_tokens_per_s"] / 2
    assert read_rows(out) == [fast, slow], "what the profile said before is another case"
    done: list[int] = []
    elsewhere = one_case(pi(tmp_path / "elsewhere", 1))
    assert sweep(shape, elsewhere, out, progress=lambda count, total: done.append(count)) == [slow]
    assert done == [1], "the same profile from another file is no other case"


def test_a_case_runs_on_the_profile_that_was_read_when_it_was_asked_for(shape: Shape, tmp_path: Path) -> None:
    (case,) = one_case(pi(tmp_path, 20))
    before = run_case(shape, case)
    pi(tmp_path, 1)
    assert run_case(shape, case) == before


def test_two_profiles_of_one_name_cannot_be_told_apart_and_are_refused(tmp_path: Path) -> None:
    both = [pi(tmp_path / "a", 1), pi(tmp_path / "b", 2)]
    with pytest.raises(UsageError, match=r"a/my-pi.toml and .*b/my-pi.toml are two profiles of one name"):
        all_cases(both, [512], ["lru"], ["device"], ["exact"], max_tokens=8, seed=0)
    assert len(all_cases(both[:1] * 2, [512], ["lru"], ["device"], ["exact"], max_tokens=8, seed=0)) == 1


def test_everything_that_changes_numbers_is_in_the_key(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = one_case()
    keys = [case.key(shape)]
    for field in dataclasses.fields(Case):
        value = getattr(case, field.name)
        other: Any = value + 1 if isinstance(value, int) else f"other {value}"
        if field.name == "device":
            other = load(pi(tmp_path, 1, case.device.name))
        keys.append(dataclasses.replace(case, **{field.name: other}).key(shape))
    changes: dict[str, Any] = {"engine": "executorch", "weights": "int8", "page_size": 16, "architecture": "qwen2"}
    keys += [case.key(dataclasses.replace(shape, **{name: value})) for name, value in changes.items()]
    keys.append(case.key(dataclasses.replace(shape, model=dataclasses.replace(shape.model, n_layers=5))))
    monkeypatch.setattr("edgekv.__version__", "next")
    keys.append(case.key(shape))
    monkeypatch.setattr("edgekv.emulator.sweep.case._code_digest", lambda: "changed between two releases")
    keys.append(case.key(shape))
    assert len(set(keys)) == len(keys)


def test_rows_say_of_which_model_they_are(shape: Shape) -> None:
    row = run_case(shape, one_case()[0])
    assert [row[name] for name in MODEL] == ["llama 0.0105 B", "onnx", "int4", 32]
    assert tuple(row) == COLUMNS


def test_a_table_of_before_rows_said_their_model_is_read_and_kept(shape: Shape, tmp_path: Path) -> None:
    (row,) = sweep(shape, one_case(), tmp_path / "sweep.csv", workers=1)
    old = {name: value for name, value in {**row, "key": "0123456789abcdef"}.items() if name not in MODEL}
    write_csv(tmp_path / "old.csv", list(old), list(old.values()))
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist([old]), tmp_path / "old.parquet")
    for name in ("old.csv", "old.parquet"):
        assert sweep(shape, one_case(), tmp_path / name, workers=1) == [row]
        assert read_rows(tmp_path / name) == [{**dict.fromkeys(MODEL), **old}, row]


def write_csv(path: Path, *lines: list[Any]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(lines)
    return path


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["key", "door"], "its column 'door' is none of a sweep's"),
        ([*COLUMNS, "notes"], "its column 'notes' is none of a sweep's"),
        ([*COLUMNS, "key"], "its column 'key' is none of a sweep's"),
        ([name for name in COLUMNS if name != "hit_rate"], "it has no column 'hit_rate'"),
    ],
)
def test_a_table_with_other_columns_is_refused_before_any_case_runs(
    shape: Shape, tmp_path: Path, names: list[str], reason: str
) -> None:
    for lines in ([names], [names, ["1"] * len(names)]):
        other = write_csv(tmp_path / "other.csv", *lines)
        before = other.read_bytes()
        with pytest.raises(UsageError, match=f"is not a table of a sweep: {reason}; choose another --out"):
            sweep(shape, one_case(), other)
        assert other.read_bytes() == before
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    if len(set(names)) == len(names):
        pq.write_table(pa.table({name: ["1"] for name in names}), tmp_path / "other.parquet")
        with pytest.raises(UsageError, match=reason):
            sweep(shape, one_case(), tmp_path / "other.parquet")
    assert {path.suffix for path in tmp_path.iterdir()} <= {".csv", ".parquet"}, "no journal stays behind"


@pytest.mark.parametrize("line", [["1"], ["1"] * (len(COLUMNS) + 1), [""] * len(COLUMNS), ["a"] * len(COLUMNS)])
def test_a_damaged_table_is_refused_before_any_case_runs(shape: Shape, tmp_path: Path, line: list[str]) -> None:
    other = write_csv(tmp_path / "other.csv", list(COLUMNS), line)
    with pytest.raises(UsageError, match=r"other.csv (cannot be read as|is not) a table of a sweep"):
        sweep(shape, one_case(), other)


def test_a_table_that_a_spreadsheet_saved_is_read(shape: Shape, tmp_path: Path) -> None:
    out = tmp_path / "sweep.csv"
    rows = sweep(shape, one_case(), out, workers=1)
    out.write_bytes(b"\xef\xbb\xbf" + out.read_bytes())
    assert sweep(shape, one_case(), out) == rows
    out.write_bytes(b"")
    assert read_rows(out) == []


def test_a_file_that_is_no_journal_is_not_taken_for_one(shape: Shape, tmp_path: Path) -> None:
    mine = tmp_path / "sweep.csv.partial"
    mine.write_text("half of a download", encoding="utf-8")
    with pytest.raises(UsageError, match="is not the journal of a sweep"):
        sweep(shape, one_case(), tmp_path / "sweep.csv")
    assert mine.read_text(encoding="utf-8") == "half of a download"


def test_a_second_sweep_into_a_table_is_refused_while_the_first_one_runs(shape: Shape, tmp_path: Path) -> None:
    out, link = tmp_path / "sweep.csv", tmp_path / "link.csv"
    sweep(shape, one_case(), out, workers=1)
    link.symlink_to(out)

    def second(done: int, total: int) -> None:
        for name in (out, link):
            with pytest.raises(StoreLocked, match=r"another sweep writes .*; wait until it ends, or choose another"):
                sweep(shape, one_case(), name, workers=1)

    sweep(shape, one_case(context=1024), out, workers=1, progress=second)
    sweep(shape, one_case(context=256), link, workers=1)
    assert [row["context"] for row in read_rows(out)] == [512, 1024, 256]
    assert link.is_symlink()


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write more than so many bytes into a file of this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_journal_or_table_that_cannot_be_written_ends_the_sweep_in_one_line_and_what_is_done_is_kept(
    shape: Shape, tmp_path: Path
) -> None:
    cases = all_cases(["android-low-4gb"], [512, 1024, 256], ["lru"], ["device"], ["exact"], max_tokens=8, seed=0)
    journal, out = tmp_path / "sweep.csv.partial", tmp_path / "sweep.csv"
    line = len(json.dumps(run_case(shape, cases[0])))
    with (
        largest_file(line * 3 // 2),
        pytest.raises(EdgeKVError, match=r"cannot write .*partial: File too large") as refused,
    ):
        sweep(shape, cases, out, workers=1)
    assert refused.value.exit_code == 1
    assert "make room there and give the command again: what is done is kept" in str(refused.value)
    done: list[int] = []
    rows = sweep(shape, cases, out, workers=1, progress=lambda count, total: done.append(count))
    assert done == [1, 2, 3]
    assert not journal.exists()
    whole, more = out.read_bytes(), one_case(context=768)
    with (
        largest_file(len(whole)),
        pytest.raises(EdgeKVError, match=r"cannot write .*sweep.csv: File too large") as refused,
    ):
        sweep(shape, more, out, workers=1)
    assert refused.value.exit_code == 1
    assert out.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.csv", "sweep.csv.partial"]
    done.clear()
    assert read_rows(out) == rows
    (last,) = sweep(shape, more, out, progress=lambda count, total: done.append(count))
    assert done == [1]
    assert read_rows(out) == [*rows, last]


def test_a_machine_without_room_says_nothing_of_a_case(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(EdgeKVError, match=r"a case cannot use .*gone.*: No such file or directory; make room there"):
        run_case(shape, one_case()[0])


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
    monkeypatch.setattr("edgekv.emulator.sweep.cluster.ANSWER_S", 0.5)
    cases = all_cases(["android-low-4gb"], [512], ["lru"], ["device"], ["exact"], max_tokens=8, seed=0)
    with pytest.raises(UsageError, match=r"has no workers; start some with: dask worker tcp://127.0.0.1:\d+"):
        sweep(shape, cases, tmp_path / "sweep.csv", scheduler=listens_at(scheduler))
    with socket.socket() as taken:  # bound and not listening: nobody else answers there
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"no dask scheduler answers at {address}"):
            sweep(shape, cases, tmp_path / "sweep.csv", scheduler=address)


def test_a_cluster_of_another_edgekv_gives_no_rows(
    scheduler: Path, shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekv.__version__", "next")
    refused = pytest.raises(EdgeKVError, match=r"have another edgekv than this one \(next\); install the same")
    with dask("worker", scheduler, "--nthreads", "1", "--no-nanny"), refused:
        sweep(shape, one_case(), tmp_path / "sweep.csv", scheduler=listens_at(scheduler))
    assert [path for path in tmp_path.iterdir() if path.name.startswith("sweep")] == []


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
        {**case.settings(), **dict.fromkeys(OUTCOME, 1.0), "peak_bytes": 1, "bytes_written": 1, "error": None}
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
