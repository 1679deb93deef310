"""What a measurement counts and what it must not reuse, on the bundled model; how fast it is, is no test."""

from __future__ import annotations

import csv
import io
import json
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgekv.bench.measurement import Bench, Result, Sample, measure
from edgekv.bench.table import to_csv, to_json, to_markdown
from edgekv.bench.workload import DEPTHS, Case, Workload
from edgekv.cli.main import run_command_line
from edgekv.errors import UsageError
from edgekv.runtime.build import commit
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.governor import Governor

Bundle = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
QUICK = ["-p", "40", "-n", "3", "-r", "2"]
#: Half of the pages of 700 tokens are on flash.
TIGHT = RunOptions(kv_budget="25%", context=704, prefixes=False)


class Watched(Generator):
    """A generator that remembers what it was asked for."""

    calls: list[tuple[str, tuple[int, ...]]]

    def prefill(self, prompt: Sequence[int], **rest: Any) -> Any:
        self.calls.append(("prefill", tuple(prompt)))
        return super().prefill(prompt, **rest)

    def step(self, tokens: Sequence[int]) -> Any:
        self.calls.append(("step", tuple(tokens)))
        return super().step(tokens)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    calls: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(Watched, "calls", calls, raising=False)
    monkeypatch.setattr("edgekv.bench.measurement.Generator", Watched)
    return calls


def small(bundle: Path, options: RunOptions | None = None, **workload: Any) -> Bench:
    return measure(
        bundle, Workload(**{"prompts": (40,), "generated": (3,), "repeat": 2, **workload}), options or RunOptions()
    )


def test_each_test_is_measured_at_each_depth_as_often_as_asked(bundle: Bundle) -> None:
    found = small(bundle("demo"), prompts=(40, 8), depths=(0, 50), repeat=3)
    names = ["pp40", "pp8", "tg3", "pp40 @ d50", "pp8 @ d50", "tg3 @ d50"]
    assert [result.case.name for result in found.results] == names
    for result in found.results:
        assert len(result.samples) == 3
        assert all(sample.seconds > 0 for sample in result.samples)
        assert result.tokens_per_s == statistics.median(
            result.case.tokens / sample.seconds for sample in result.samples
        )
    assert found.context == 90
    assert found.peak_rss_bytes > 0


def test_a_kind_is_left_out_with_0_and_both_are_refused() -> None:
    assert [case.name for case in Workload((0,), (5, 0, 7)).cases()] == ["tg5", "tg7"]
    with pytest.raises(UsageError, match="nothing to measure: give --prompt-tokens or --generate a number above 0"):
        Workload((0,), (0,))


@pytest.mark.parametrize(("text", "numbers"), [("512", (512,)), ("0, 4096,0", (0, 4096)), ("2,1", (2, 1))])
def test_several_numbers_have_commas_between_and_stand_once(text: str, numbers: tuple[int, ...]) -> None:
    assert DEPTHS.read(text) == DEPTHS.check(list(map(int, text.split(",")))) == DEPTHS.check(text) == numbers


@pytest.mark.parametrize(
    "value", ["", ",", "1,", "1,,2", "1 2", "1;2", "-1", "1,2.5", "0x10", [], [True], b"1", 1, None]
)
def test_several_numbers_that_make_no_sense_are_refused(value: object) -> None:
    with pytest.raises(
        UsageError, match="depths must be whole numbers from 0 to 16777216 with commas between, such as 512,"
    ):
        DEPTHS.check(value)


def test_repetitions_take_turns_there_and_back(bundle: Bundle) -> None:
    said: list[tuple[str, int, int]] = []
    workload = Workload((4,), (2,), (0, 8), repeat=3)
    measure(bundle("demo"), workload, RunOptions(), lambda *progress: said.append(progress))
    there, back = ["pp4", "tg2", "pp4 @ d8", "tg2 @ d8"], ["pp4 @ d8", "tg2 @ d8", "pp4", "tg2"]
    assert [name for name, _, _ in said] == ["warm-up", *there, *back, *there]
    assert [(done, total) for _, done, total in said[1:]] == [(done, 12) for done in range(12)]


@pytest.mark.parametrize("form", ["split", "inline"])
def test_what_comes_behind_a_depth_is_computed_each_time_and_the_depth_is_not_counted(
    bundle: Bundle, form: str, watched: list[tuple[str, tuple[int, ...]]]
) -> None:
    # 50 is inside of a page that generated tokens fill: the cache cannot be cut there, and the depth is read again.
    found = small(bundle("demo", form), generated=(40,), depths=(50, 64))
    behind = [call for call in watched if call[0] == "prefill" and len(call[1]) in (90, 104)]
    assert len(behind) == 4
    assert len({prompt[:50] for _, prompt in behind}) == 1
    assert sum(call == "step" for call, _ in watched) == 4 + 2 * 2 * 40  # the warm-up first
    assert {result.case.tokens for result in found.results} == {40}


def test_no_token_of_a_measurement_ends_a_text(bundle: Bundle, watched: list[tuple[str, tuple[int, ...]]]) -> None:
    found = small(bundle("demo"), prompts=(900,), generated=(2,))
    asked = {token for _, tokens in watched for token in tokens}
    assert len(asked) > 100
    assert max(asked) < found.manifest.model.vocab_size
    assert not asked & set(found.manifest.model.eos_token_ids)


def test_no_prefix_and_no_session_is_used_even_if_asked_for(bundle: Bundle) -> None:
    assert small(bundle("demo"), RunOptions(prefixes=True)).options.prefixes is False


def test_bytes_of_flash_are_those_that_the_store_of_a_run_counts(
    bundle: Bundle, watched: list[tuple[str, tuple[int, ...]]], tmp_path: Path
) -> None:
    depth, count = 700, 4
    found = small(bundle("demo"), TIGHT, prompts=(0,), generated=(count,), depths=(depth,))
    (result,) = found.results
    tokens = next(prompt for call, prompt in watched if call == "prefill" and len(prompt) == depth)
    steps = [step for call, step in watched if call == "step"][-count:]
    with Generator.open(bundle("demo"), TIGHT) as run:
        run.prefill(tokens, max_tokens=count)
        assert run.cache is not None
        store = run.cache.manager.store
        assert store is not None
        read, written = store.counters.bytes_read, store.counters.bytes_written
        for step in steps:
            run.step(step)
        read, written = store.counters.bytes_read - read, store.counters.bytes_written - written
    assert read > 0
    assert [(sample.bytes_read, sample.bytes_written) for sample in result.samples] == [(read, written)] * 2
    assert result.read_bytes_per_token == read / count
    row = to_json(found)["results"][0]
    assert row["flash_read_bytes_per_token"] == read / count


def test_with_pages_on_flash_each_repetition_writes_what_the_first_one_wrote(bundle: Bundle) -> None:
    found = small(bundle("demo"), TIGHT, prompts=(600,), generated=(0,), depths=(100,), repeat=3)
    (result,) = found.results
    assert result.written_bytes_per_token > 0
    assert len({(sample.bytes_read, sample.bytes_written) for sample in result.samples}) == 1


def test_without_a_budget_nothing_goes_to_flash_and_no_column_speaks_of_it(bundle: Bundle) -> None:
    found = small(bundle("demo"))
    assert all(sample.bytes_read == sample.bytes_written == 0 for one in found.results for sample in one.samples)
    assert "flash" not in to_markdown(found)


def test_the_spread_is_that_of_the_repetitions() -> None:
    result = Result(Case("tg", 12, 0), tuple(Sample(seconds, 0, 0) for seconds in (1, 2, 3, 4, 6)))
    assert result.rates == [12, 6, 4, 3, 2]
    assert (result.tokens_per_s, result.spread) == (4, 2)


def test_a_changed_budget_is_said(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Governor, "between_steps", lambda governor: governor.stats.count(1, 1, 0.0, 1))
    assert "memory was short meanwhile: the budget was changed" in to_markdown(small(bundle("demo")))


def test_the_table_is_one_of_markdown_with_all_that_an_issue_must_say(bundle: Bundle) -> None:
    found = small(bundle("demo"), TIGHT, depths=(0, 600))
    lines = to_markdown(found).splitlines()
    table = [line for line in lines if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    assert cells[0] == [
        "model", "size", "engine", "weights", "kv", "threads", "test", "t/s", "flash read/token", "flash written/token",
    ]  # fmt: skip
    assert len({len(line) for line in table}) == 1
    assert [row[6] for row in cells[2:]] == ["pp40", "tg3", "pp40 @ d600", "tg3 @ d600"]
    assert all(" ± " in row[7] for row in cells[2:])
    assert [row[8] == "0 B" for row in cells[2:]] == [True, True, False, False]
    below = "\n".join(lines[len(table) :])
    env = found.environment
    for said in (env.edgekv_version, env.kernels, env.engine, env.processor, env.system, "peak memory", "batches of"):
        assert said in below
    assert found.environment.engine in cells[2][2]
    assert cells[2][4].startswith("int8, ")


def test_one_repetition_has_no_spread(bundle: Bundle) -> None:
    assert "±" not in to_markdown(small(bundle("demo"), repeat=1))


def test_csv_and_json_say_the_same(bundle: Bundle) -> None:
    found = small(bundle("demo"), depths=(0, 10))
    data, rows = to_json(found), list(csv.DictReader(io.StringIO(to_csv(found))))
    assert len(rows) == len(data["results"]) == 4
    flat = {**data, **data["environment"]}
    for row, result in zip(rows, data["results"], strict=True):
        for name, text in row.items():
            value = result[name] if name in result else flat[name]
            assert text == ("" if value is None else str(value)), name
    assert all(len(result["samples"]) == 2 for result in data["results"])


def test_a_checkout_has_a_commit_and_an_environment_inside_of_another_one_has_none(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True).stdout

    assert commit(tmp_path) is None
    git("init", "-q")
    assert commit(tmp_path) is None  # nothing is committed
    (tmp_path / "a").write_text("a", encoding="utf-8")
    git("add", "a")
    git("commit", "-q", "-m", "a")
    git("tag", "-a", "v1", "-m", "v1")
    assert commit(tmp_path) == git("rev-parse", "--short=10", "HEAD").strip()
    (tmp_path / "a").write_text("b", encoding="utf-8")
    assert str(commit(tmp_path)).endswith("-dirty")
    (tmp_path / "site-packages").mkdir()
    assert commit(tmp_path / "site-packages") is None


def test_the_command_prints_the_table_alone_on_stdout(bundle: Bundle, capsys: Capture) -> None:
    assert run_command_line(["bench", str(bundle("demo")), *QUICK]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("| model ")
    assert str(bundle("demo").parent) not in printed.out


def test_the_command_prints_json_or_csv(bundle: Bundle, capsys: Capture) -> None:
    assert run_command_line(["bench", str(bundle("demo")), *QUICK, "--json"]) == 0
    assert [row["test"] for row in json.loads(capsys.readouterr().out)["results"]] == ["pp40", "tg3"]
    assert run_command_line(["bench", str(bundle("demo")), *QUICK, "--csv"]) == 0
    assert [row["test"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))] == ["pp40", "tg3"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-d", "0,8100"], "--depth 8100 leaves no room for pp512: the model was made for 8192 tokens; lower it to 7680 or less"),
        (["-d", "8192", "-p", "0"], "--depth 8192 leaves no room for tg64: the model was made for 8192 tokens; lower it to 8128"),
        (["-p", "8193"], "--prompt-tokens 8193 is above what the model was made for, 8192 tokens; lower it"),
        (["-n", "9000", "-p", "0"], "--generate 9000 is above what the model was made for, 8192 tokens; lower it"),
        (["-p", "0", "-n", "0"], "there is nothing to measure"),
        (["--json", "--csv"], "give --json or --csv, not both"),
        (["-p", "512;2048"], "--prompt-tokens must be whole numbers from 0 to 16777216 with commas between"),
        (["-r", "0"], "--repeat must be a whole number from 1 to 1000"),
        (["--kv-budget", "1KiB"], "a KV budget of 1.0 KiB is too small"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_line_with_the_way_out(
    arguments: list[str], words: str, bundle: Bundle, capsys: Capture
) -> None:
    assert run_command_line(["bench", str(bundle("demo")), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("edgekv: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err


def test_a_depth_that_just_fits_is_measured(bundle: Bundle, capsys: Capture) -> None:
    assert (
        run_command_line(["bench", str(bundle("demo")), "-p", "0", "-n", "2", "-d", "8190", "-r", "1", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["context"] == 8192
