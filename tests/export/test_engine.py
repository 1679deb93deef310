"""Without --engine, the measured table chooses, and the command says which engine and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgekv.bundle import read_manifest
from edgekv.cli.main import app
from edgekv.contract import WEIGHTS
from edgekv.export import choose_engine as engine
from edgekv.export.choose_engine import Measurement, default_engine, measurements, slow_on
from edgekv.host import machine_class

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "executorch.md"


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "executorch_installed", lambda: True)


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("row", measurements(), ids=lambda row: f"{row.machine}, {row.weights}")
def test_the_engine_that_measured_faster_is_chosen_with_both_numbers(row: Measurement) -> None:
    machine, weights = row.machine, row.weights
    assert weights in WEIGHTS
    choice = default_engine("split", weights, machine)
    other = {"onnx": "executorch", "executorch": "onnx"}[choice.engine]
    speeds = {name: getattr(row, name) for name in (choice.engine, other)}
    assert speeds[choice.engine] >= speeds[other] > 0
    assert choice.operators == (row.operators if choice.engine == "executorch" else None)
    assert f"{speeds[choice.engine]:.0f} tokens/s against {speeds[other]:.0f} of {other} on {machine}" in choice.reason


@pytest.mark.usefixtures("_installed")
def test_what_was_not_measured_gets_the_engine_that_runs_everywhere() -> None:
    assert default_engine("split", "int4", "abacus").engine == "onnx"
    assert "nothing faster was measured on abacus" in default_engine("split", "int4", "abacus").reason
    assert all(default_engine("inline", weights).engine == "onnx" for weights in WEIGHTS)


def test_a_faster_engine_that_is_not_installed_is_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Measurement("abacus", "int4", 1.0, 2.0, "edgekv", "wood")
    monkeypatch.setattr(engine, "measurements", lambda: [row])
    monkeypatch.setattr(engine, "executorch_installed", lambda: False)
    choice = default_engine("split", "int4", "abacus")
    assert choice.engine == "onnx"
    assert "not installed: pip install" in choice.reason


def test_the_command_says_which_engine_it_took_and_why(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "m.edgekv"
    result = CliRunner().invoke(app, ["export", str(checkpoint("llama")), "--out", str(out)])
    assert result.exit_code == 0, result.output
    choice = default_engine("split", "fp32")
    assert read_manifest(out).engine == choice.engine
    assert f"{choice.engine}: {choice.reason} (--engine decides)" in result.output


def test_the_page_in_docs_shows_every_measurement() -> None:
    page = DOCUMENT.read_text(encoding="utf-8")
    for row in measurements():
        speeds = f"{row.onnx} | {row.executorch} | {row.operators}"
        assert f"| {row.machine} | {row.weights} | {speeds} | {row.on} |" in page


def test_this_machine_has_a_class() -> None:
    assert machine_class().strip()


def test_the_last_line_of_an_export_says_where_the_choice_is_slow(tmp_path: Path) -> None:
    out = tmp_path / "demo.edgekv"
    command = ["export", "demo", "--engine", "onnx", "--weights", "int4", "--calibration", "none", "--out", str(out)]
    last = CliRunner().invoke(app, command).stderr.strip().splitlines()[-1]
    assert last.startswith("onnx: on x86-64 without AVX-512 VNNI a prompt is read")
    assert "--engine executorch --operators xnnpack" in last
    assert json.loads(CliRunner().invoke(app, [*command, "--force", "--json"]).stdout)["slow_on"] in last
    assert slow_on("executorch", "split", "int4", "edgekv") != slow_on("executorch", "split", "int4", "xnnpack")
    assert slow_on("onnx", "split", "fp32", None) is None
