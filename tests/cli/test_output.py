"""What commands print: whole lines for whoever copies or pipes them, JSON for scripts, and mistakes before any work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from edgekv.cli.main import app, run_command_line
from edgekv.cli.output import print_json, print_json_line

Bundle = Callable[..., Path]
SWEEP = ["sweep", "BUNDLE", "--contexts", "512", "--out", "OUT", "--profiles"]
Capture = pytest.CaptureFixture[str]


def leaves(command: Any, path: str = "edgekv") -> list[tuple[str, Any]]:
    """Return every command with the words that call it."""
    if not hasattr(command, "commands"):
        return [(path, command)]
    own = [(path, command)] if command.callback is not None and path != "edgekv" else []
    return own + [leaf for name, sub in command.commands.items() for leaf in leaves(sub, f"{path} {name}")]


COMMANDS = leaves(typer.main.get_command(app))


def test_every_command_has_json() -> None:
    without = [
        path
        for path, command in COMMANDS
        if not hasattr(command, "commands") and not any("--json" in parameter.opts for parameter in command.params)
    ]
    assert without == []


def test_a_command_is_imported_when_it_is_asked_for_and_no_other_one() -> None:
    code = (
        "import sys; from edgekv.cli.main import run_command_line; run_command_line(['profiles', 'list', '--json'])\n"
        "print([name for name in sys.modules if name.startswith(('edgekv.plan', 'edgekv.cli.run', 'edgekv.runtime.gen'))])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_what_is_piped_is_not_wrapped_at_the_width_of_a_terminal(
    bundle: Bundle, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert run_command_line(["inspect", str(bundle("demo"))]) == 0
    printed = capsys.readouterr().out
    manifest = json.loads((bundle("demo") / "manifest.json").read_text(encoding="utf-8"))
    assert f"checkpoint       sha256 {manifest['source_sha256']}\n" in printed
    assert run_command_line(["plan", str(bundle("demo")), "--profile", "laptop-16gb", "--context", "4096"]) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if "edgekv run" in line)
    assert command.strip() == f"edgekv run {bundle('demo')} --profile laptop-16gb --context 4096 --chat"
    assert run_command_line(["profiles", "show", "laptop-16gb"]) == 0
    assert 100 < max(len(line.rstrip()) for line in capsys.readouterr().out.splitlines()) < 1000


def test_inspect_prints_the_sizes_of_every_layer_as_those_of_any(bundle: Bundle) -> None:
    printed = CliRunner().invoke(app, ["inspect", str(bundle("demo", "inline"))]).stdout
    assert re.search(r"key_pages\.\{l\} +int8 +\[N\{l\}, \d+, \d+, 16\]", printed)
    assert re.search(r"recent_positions\.\{l\} +int64 +\[R\{l\}\]", printed)
    assert not re.search(r"\b[A-Z]0\b", printed)


def test_a_terminal_may_wrap_a_fact_but_a_copy_of_it_is_one_line(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    monkeypatch.setenv("COLUMNS", "40")
    printed = CliRunner().invoke(app, ["inspect", str(bundle("demo"))]).stdout
    assert json.loads((bundle("demo") / "manifest.json").read_text(encoding="utf-8"))["source_sha256"] in printed


def test_json_has_no_number_that_json_does_not_know(capsys: Capture) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": "“"})
    print_json_line((float("-inf"),))
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text[: text.index("}") + 1]) == {"a": None, "b": [None, 1.5], "c": "“"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "llama3.2", "-p", "a"], ["there is no llama3.2", "edgekv export SOURCE --out llama3.2"]),
        (["inspect", "CHECKPOINT"], ["is a checkpoint, not a bundle", "edgekv export"]),
        ([*SWEEP, "nope"], ["no profile is named 'nope'"]),
        ([*SWEEP, "laptop-16gb", "--policies", "fifo"], ["policy must"]),
        ([*SWEEP, "laptop-16gb", "--budgets", "nan%"], ["kv_budget"]),
        ([*SWEEP, "laptop-16gb", "--page", "/proc/page.html"], ["cannot write --page /proc/page.html"]),
        (["profiles", "calibrate", "--out", "bad name!.toml"], ["'bad name!' is not the name of a profile"]),
        (["profiles", "calibrate", "--name", "Bad"], ["'Bad' is not the name of a profile"]),
        (["profiles", "calibrate", "--bundle", "nothing"], ["there is no nothing"]),
        (["profiles", "calibrate", "--out", "/proc/none/a.toml"], ["cannot write /proc/none/a.toml"]),
        (["plan", "BUNDLE", "--all-profiles", "--context", "9999999"], ["above what the model was made for, 8192"]),
        (["plan", "BUNDLE", "--all-profiles", "--context", "999999999"], ["--context must be a whole number"]),
        (["export", "/nowhere", "--out", "OUT"], ["/nowhere is not a folder"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_any_work(
    arguments: list[str], words: list[str], bundle: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    names = {
        "BUNDLE": str(bundle("demo")),
        "OUT": str(tmp_path / "out.csv"),
        "CHECKPOINT": str(tmp_path / "checkpoint"),
    }
    assert run_command_line([names.get(word, word) for word in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("edgekv: ")
    assert printed.err.count("\n") == 1
    assert all(word in printed.err for word in words), printed.err
    assert os.listdir(tmp_path) == ["checkpoint"]
