"""The pages in a real browser: every chart is drawn, offline."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edgekv.emulator import Device
from edgekv.emulator.play.play import emulate_shape
from edgekv.emulator.play.scenario import AppSettings, Scenario, Turn
from edgekv.emulator.play.shape_app import read_shape
from edgekv.emulator.report.html import to_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_a_browser_draws_every_chart_without_a_network(config: Path, tmp_path: Path) -> None:
    scenario = Scenario(
        (Turn(prompt_tokens=600, max_tokens=30),), app=AppSettings(kv_budget="25%"), title="a <title> & more"
    )
    result = emulate_shape(read_shape(config), Device("android-low-4gb"), scenario)
    path = tmp_path / "report.html"
    path.write_text(to_html(result), encoding="utf-8")
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
    for name in ("memory", "speed", "pages", "flash", "tiers", "use"):
        figure = re.search(rf'<div class="figure[^"]*" id="{name}".*?</svg>', drawn, re.DOTALL)
        assert figure is not None, f"{name} was not drawn"
    assert "a <title> & more" in html.unescape(drawn)
