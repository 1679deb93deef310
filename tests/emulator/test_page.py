"""The pages in a real browser: every chart is drawn, offline."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgekv.emulator import Device
from edgekv.emulator.play.play import emulate_shape
from edgekv.emulator.play.scenario import AppSettings, Scenario, Turn
from edgekv.emulator.play.shape_app import read_shape
from edgekv.emulator.report.html import to_html
from edgekv.emulator.report.plots import CHARACTER, figure, log_axis, mark

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_a_browser_draws_every_chart_without_a_network(config: Path, tmp_path: Path) -> None:
    scenario = Scenario(
        (Turn(prompt_tokens=600, max_tokens=30),), app=AppSettings(kv_budget="25%"), title="a <title> & more"
    )
    result = emulate_shape(read_shape(config), Device("android-low-4gb"), scenario)
    path = tmp_path / "report.html"
    path.write_text(to_html(result, "config.json"), encoding="utf-8")
    assert path.stat().st_size < 3_000_000
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path}",
    ]
    drawn = subprocess.run(
        [str(BROWSER), *flags, "--virtual-time-budget=60000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert 'data-drawn="yes"' in drawn
    for name in ("memory", "cache", "speed", "pages", "flash", "tiers", "use"):
        figure = re.search(rf'<div class="figure[^"]*" id="{name}".*?</svg>', drawn, re.DOTALL)
        assert figure is not None, f"{name} was not drawn"
    assert "a <title> & more" in html.unescape(drawn)


def test_memory_is_drawn_in_the_unit_of_the_run_and_the_title_says_what_ran(config: Path) -> None:
    result = emulate_shape(
        read_shape(config), Device("android-low-4gb"), Scenario((Turn(prompt_tokens=200, max_tokens=8),))
    )
    figures = drawn_figures(to_html(result, "tiny.json"))
    assert figures["memory"]["layout"]["yaxis"]["title"]["text"] == "GiB"  # the limit of the device
    assert figures["cache"]["layout"]["yaxis"]["title"]["text"] == "KiB"
    page = to_html(result, "tiny.json")
    assert "<h1>tiny.json on Low-end Android phone" in page
    assert "a prompt of 200 tokens, at most 8 tokens generated" in page


def test_labels_of_events_leave_each_other_room() -> None:
    drawn = figure([])
    moments = sorted([0.0, 0.1, 0.2, 5.0, *(7 + index / 100 for index in range(20))])
    mark(drawn, [(at, f"read-errors {index}") for index, at in enumerate(moments)], 10.0)
    labels = [
        (note.yshift, note.x / 10.0, note.x / 10.0 + CHARACTER * len(note.text)) for note in drawn.layout.annotations
    ]
    assert len(drawn.layout.shapes) == len(moments)
    assert len(labels) == 7, "those that found no room are counted by the last"
    assert drawn.layout.annotations[-1].text.endswith("and 17 more")
    for (row, _, end), (other, start, _) in itertools.combinations(sorted(labels), 2):
        assert row != other or end <= start


@pytest.mark.parametrize("values", [[0.01, 0.012], [3.0, 250.0], [1.0, 1e9], [7.0], []])
def test_a_logarithmic_axis_has_round_ticks_around_its_values(values: list[float]) -> None:
    axis = log_axis("tokens/s", values)
    assert 1 <= len(axis["tickvals"]) <= 10
    low, high = (10**power for power in axis["range"])
    assert all(low <= value <= high for value in [*values, *axis["tickvals"]])
    assert len(set(axis["ticktext"])) == len(axis["ticktext"])


def drawn_figures(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    figures: dict[str, Any] = json.loads(found[1])
    return figures
