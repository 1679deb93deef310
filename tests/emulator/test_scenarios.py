"""Whatever happens to a device, a report comes out; what the app had saved is there again."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgekv.emulator import Device, Event
from edgekv.emulator.play.play import emulate, emulate_shape
from edgekv.emulator.play.result import Result
from edgekv.emulator.play.scenario import AppSettings, Scenario, Turn, load_scenario
from edgekv.emulator.play.shape_app import read_shape
from edgekv.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent.parent
SCENARIOS = sorted((ROOT / "examples" / "scenarios").glob("*.toml"))


def kinds(result: Result) -> list[str]:
    return [entry["kind"] for entry in result.log]


def test_a_kill_in_the_middle_of_an_answer_costs_time_and_no_token(tiny: Path) -> None:
    turns = (Turn(prompt="An operating system runs programs", max_tokens=60),)
    app = AppSettings(session=True, checkpoint_tokens=8)
    undisturbed = emulate(tiny, Device("android-low-4gb"), Scenario(turns, app=app))
    assert undisturbed.turns[0].answer_tokens == 60
    middle = undisturbed.totals["seconds"] * 0.6
    device = Device("android-low-4gb")
    killed = emulate(tiny, device, Scenario(turns, app=app, events=(Event(middle, "kill"),)))
    assert kinds(killed) == ["killed", "restart"]
    assert killed.turns[0].text == undisturbed.turns[0].text
    assert killed.turns[0].computed_tokens < undisturbed.turns[0].computed_tokens + 40
    assert killed.totals["seconds"] > undisturbed.totals["seconds"] + app.restart_s


def test_a_pause_between_turns_is_part_of_no_step(tiny: Path) -> None:
    turns = (Turn(prompt_tokens=50, max_tokens=5), Turn(prompt_tokens=50, max_tokens=5, pause_s=100))
    result = emulate(tiny, Device("android-low-4gb"), Scenario(turns))
    assert result.turns[1].began_s > 100
    assert max(result.samples["step_s"]) < 1


def test_an_app_without_a_session_starts_its_answer_over_after_a_kill(tiny: Path) -> None:
    turns = (Turn(prompt_tokens=200, max_tokens=40),)
    undisturbed = emulate(tiny, Device("android-low-4gb"), Scenario(turns))
    middle = undisturbed.totals["seconds"] * 0.9
    killed = emulate(tiny, Device("android-low-4gb"), Scenario(turns, events=(Event(middle, "kill"),)))
    assert killed.turns[0].answer_tokens == 40
    assert killed.turns[0].computed_tokens == 400


def test_an_app_that_cannot_live_on_the_device_is_given_up_after_a_few_starts(tiny: Path) -> None:
    device = Device("android-low-4gb", app_limit="100MiB")
    result = emulate(tiny, device, Scenario((Turn(prompt_tokens=64),), app=AppSettings(kv_budget="1MiB", restarts=2)))
    assert result.turns[0].kills == 3
    assert result.turns[0].error is not None
    assert "lmkd" in result.turns[0].error


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_a_scenario_that_comes_with_edgekv_ends_in_a_report(path: Path, tiny: Path, config: Path) -> None:
    scenario = load_scenario(path)
    app = replace(scenario.app, kv_budget="40%") if scenario.app.kv_budget else scenario.app
    small = tuple(replace(turn, prompt_tokens=(turn.prompt_tokens or 0) // 2, max_tokens=20) for turn in scenario.turns)
    real = emulate(tiny, Device("android-low-4gb", app_limit="250MiB"), replace(scenario, turns=small, app=app))
    assert len(real.turns) == len(scenario.turns)
    weightless = emulate_shape(read_shape(config), Device("android-low-4gb", app_limit="1GB"), scenario)
    assert len(weightless.turns) == len(scenario.turns)
    assert {event.kind for event in scenario.events} - {"kill"} <= set(kinds(weightless))


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tiny: Path, config: Path, tmp_path: Path) -> None:
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(
        '[app]\nkv_budget = "25%"\nsession = true\n[[turn]]\nprompt_tokens = 700\nmax_tokens = 20\n'
        '[[event]]\nkind = "kill"\nat_s = 0.5\n[[event]]\nkind = "read-errors"\nat_s = 2.6\nrate = 0.01\n',
        encoding="utf-8",
    )
    for model in (tiny, config):
        said = []
        for index in range(2):
            page = tmp_path / f"{index}.html"
            command = ["emulate", str(model), "--profile", "android-low-4gb", "--scenario", str(scenario), "--json"]
            run = [sys.executable, "-m", "edgekv", *command, "--report", str(page), "--app-limit", "600MB"]
            said.append((subprocess.run(run, capture_output=True, check=True).stdout, page.read_bytes()))
        assert said[0] == said[1]
        assert json.loads(said[0][0])["totals"]["bytes_written"] > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[turn]]\nmax_tokens = 5", "turn 1: a turn needs one of prompt, prompt_file and prompt_tokens"),
        ("[[turn]]\nprompt_tokens = 'x'", "turn 1.prompt_tokens is 'x'; it must be a whole number"),
        ("[[turn]]\nprompt_tokens = 5\n[[event]]\nat_s = 1\nkind = 'flood'", "event 1: unknown event 'flood'"),
        (
            "[[turn]]\nprompt_tokens = 5\n[[event]]\nat_s = 1\nkind = 'damage'",
            "event 1: an event 'damage' needs `rate`",
        ),
        ("[[turn]]\nprompt_tokens = 5\n[[event]]\nkind = 'kill'", "event 1.at_s is missing"),
        ("[[turn]]\nprompt_tokens = 5\n[app]\nbudget = 1", 'app.budget is not a field; did you mean "kv_budget"?'),
        ("title = 'nothing'", "has no [[turn]]"),
        ("[[turn]", "scenario.toml: it is not valid TOML: "),
    ],
)
def test_a_scenario_that_makes_no_sense_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as refused:
        load_scenario(path)
    assert message in str(refused.value)
