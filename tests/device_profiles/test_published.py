"""Predicted against published tokens per second: the program that says how far the device model can be trusted."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "benchmarks" / "predictions" / "published_data" / "rows.csv"


def predict(*arguments: str) -> dict[str, Any]:
    program = [sys.executable, "-m", "benchmarks.predictions.published", "--json", *arguments]
    result = subprocess.run(program, capture_output=True, text=True, check=True, cwd=ROOT)
    data: dict[str, Any] = json.loads(result.stdout)
    return data


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    return predict()


pytestmark = pytest.mark.slow  # it reads thousands of rows and fits them


def held_out(data: dict[str, Any], device: str, engine: str, kind: str) -> float:
    (score,) = [
        score
        for score in data["scores"]
        if (score["device"], score["engine"], score["kind"], score["paged"]) == (device, engine, kind, False)
    ]
    assert score["rows"] >= 5
    return float(score["held_out"])


@pytest.mark.parametrize(
    ("device", "engine"),
    [
        ("Raspberry Pi 5", "llama.cpp 4T"),
        ("OnePlus 12", "ExecuTorch CPU"),
        ("iPhone 16 Pro", "ExecuTorch CPU"),
        ("Jetson Orin Nano", "MLC"),
        ("Intel i9-14900 PC", "PowerInfer"),
        ("Jetson AGX Orin", "vLLM"),
    ],
)
def test_decode_of_models_that_were_held_out_is_within_ten_percent(
    shipped: dict[str, Any], device: str, engine: str
) -> None:
    assert held_out(shipped, device, engine, "decode") <= 0.10


@pytest.mark.parametrize(("device", "engine"), [("Raspberry Pi 5", "llama.cpp 4T"), ("OnePlus 12", "ExecuTorch CPU")])
def test_prefill_of_models_that_were_held_out_is_within_twenty_percent(
    shipped: dict[str, Any], device: str, engine: str
) -> None:
    assert held_out(shipped, device, engine, "prefill") <= 0.20


def test_every_pair_with_five_rows_meets_its_bar(shipped: dict[str, Any]) -> None:
    verdicts = [(score["device"], score["engine"], score["kind"], score["verdict"]) for score in shipped["scores"]]
    assert [verdict for *_, verdict in verdicts if verdict] == ["met"] * 8, verdicts


def test_every_row_is_predicted_or_left_out_with_a_reason(shipped: dict[str, Any]) -> None:
    with ROWS.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    figures = sum(bool(row[key]) for row in rows for key in ("decode_tok_s", "prefill_tok_s"))
    left_out = len(shipped["left_out"])
    assert left_out < len(rows) / 10
    assert figures - 2 * left_out <= len(shipped["rows"]) <= figures - left_out
    assert all(why for _, why in shipped["left_out"])


def test_models_that_exceed_a_pi_fall_off_the_cliff_in_the_prediction_too(shipped: dict[str, Any]) -> None:
    paged = [row for row in shipped["rows"] if row["paged"] and row["device"] == "Raspberry Pi 5"]
    fits = [row for row in shipped["rows"] if "Qwen2.5-7B Q8_0" in row["model"] and row["kind"] == "decode"]
    assert len(paged) >= 6
    assert all(fits[0]["held_out"] / row["held_out"] > 20 for row in paged)


def test_rows_of_another_file_are_predicted_by_fits_that_never_saw_them(tmp_path: Path) -> None:
    lines = ROWS.read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if "Phi-3.5-mini-instruct Q8_0" in line)
    doubled = tmp_path / "more.csv"
    doubled.write_text("\n".join([lines[0], row.replace("2.423", "4.846")]), encoding="utf-8")
    (decode, _) = predict("--rows", str(doubled))["rows"]
    assert decode["fitted"] is None
    assert decode["held_out"] == pytest.approx(2.42, rel=0.1)
    assert decode["published"] == 4.846
