"""The command and its reports, as people and scripts meet them; the page in a real browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekv.runtime.generate import RunOptions
from edgekv.tiers import KVMode
from edgekv.verify.gate import load_gate
from edgekv.verify.html import to_html
from edgekv.verify.judge import Settings, verify
from edgekv.verify.tasks import Suite
from edgekv.verify.verdict import Verdict
from tests.test_cli import cli, here, refused

Bundle = Callable[..., Path]

#: Runs in the browser after the page: what was laid out, and what does not fit.
PROBE = """<script>addEventListener("load", () => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
  const pre = document.createElement("pre"); pre.id = "probe";
  const svg = document.querySelector("svg").getBoundingClientRect();
  const outside = [...document.querySelectorAll("svg text, svg circle, svg polyline")].filter(e => {
    const r = e.getBoundingClientRect();
    return r.left < svg.left - 1 || r.right > svg.right + 1 || r.top < svg.top - 1 || r.bottom > svg.bottom + 1; });
  pre.textContent = JSON.stringify({
    svg: box(document.querySelector("svg")), overflow: document.documentElement.scrollWidth - innerWidth,
    lines: [...document.querySelectorAll("polyline")].map(e => [box(e), getComputedStyle(e).stroke]),
    tables: [...document.querySelectorAll("table")].map(box), outside: outside.length,
    requests: performance.getEntriesByType("resource").length });
  document.body.append(pre); });</script>"""


@pytest.fixture(scope="module")
def verdict(bundle: Bundle) -> Verdict:
    suite = Suite(lengths=(256,), depths=(0.0, 0.5), keys=(), pairs=(2,), others=False)
    settings = Settings(tokens=640, decode=64, greedy=4, suite=suite)
    options = RunOptions(threads=2, kv=KVMode.INT8, kv_budget="45%")
    return verify(bundle("demo"), options, load_gate("standard"), settings)


def browser() -> str:
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


@pytest.mark.parametrize("width", [1200, 480])
def test_the_page_is_whole_in_a_real_browser(verdict: Verdict, width: int, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(to_html(verdict).replace("</body>", PROBE + "</body>"), encoding="utf-8")
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},1400", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    seen: dict[str, Any] = json.loads(dom.split('<pre id="probe">')[1].split("</pre>")[0])
    assert seen["svg"][0] > 400
    assert seen["overflow"] <= 0, "the page scrolls sideways"
    assert seen["outside"] == 0, "a part of the chart is cut off"
    assert len(seen["lines"]) == len([row for row in verdict.rows if row.curve]) == 5
    assert all(size[0] > 200 for size, _ in seen["lines"])
    assert len({stroke for _, stroke in seen["lines"]} - {"none"}) == 5, "every line has a colour of its own"
    assert len(seen["tables"]) >= 3
    assert seen["requests"] == 0


def test_the_page_needs_nothing_but_itself(verdict: Verdict) -> None:
    page = to_html(verdict)
    for outside in ("http", "src=", "<link", "@import", "<script"):
        assert outside not in page
    assert len(page) < 100_000


def test_names_from_outside_are_escaped(verdict: Verdict) -> None:
    page = to_html(replace(verdict, gate="<b>mine</b>", remarks=["a < b & c"]))
    assert "<b>mine" not in page
    assert "a &lt; b &amp; c" in page


def test_the_command_prints_a_table_and_writes_the_page(bundle: Bundle, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = here("verify", bundle("demo"), "--quick", "--tokens", "256", "--html", page)
    assert result.returncode == 0, result.stderr
    assert "this configuration" in result.stdout
    assert "bit-identical to the same tier" in result.stdout
    assert "is passed" in result.stderr
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_failed_gate_is_one_line_and_exit_code_1_and_the_json_still_comes(bundle: Bundle, tmp_path: Path) -> None:
    gate = tmp_path / "impossible.toml"
    gate.write_text("[exact]\nmean_kld = 0\n", encoding="utf-8")
    result = here("verify", bundle("demo"), "--quick", "--tokens", "256", "--gate", gate, "--json")
    assert result.returncode == 1
    data = json.loads(result.stdout)
    assert data["passed"] is False
    assert data["gate"] == "impossible"
    [line] = [line for line in result.stderr.splitlines() if line]
    assert line.startswith("edgekv: the gate 'impossible' failed: mean KLD (whole text) is ")
    assert "asks for at most 0" in line


@pytest.mark.slow
def test_two_processes_print_the_same_bytes_whatever_came_from_flash_and_when(bundle: Bundle) -> None:
    request: list[str | Path] = [
        "verify",
        bundle("demo"),
        "--quick",
        "--kv-budget",
        "40%",
        "--attend",
        "selective:30%",
        "--json",
    ]
    first, second = cli(*request), cli(*request)
    assert first.stdout == second.stdout
    selection = json.loads(first.stdout)["rows"][0]["selection"]
    assert 0 < selection["hit_rate"] <= 1
    assert 0 < selection["missing_mean"]["mean"] <= selection["missing_max"]["max"] <= 1


def test_mistakes_are_refused_before_anything_is_computed(bundle: Bundle, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.", encoding="utf-8")
    gate = tmp_path / "gate.toml"
    gate.write_text("[exact]\nmean_kdl = 1\n", encoding="utf-8")
    refused(here("verify", bundle("demo"), "--gate", "loose"), 2, "no gate 'loose'", "strict, standard or weights")
    refused(here("verify", bundle("demo"), "--gate", gate), 2, str(gate), "exact.mean_kdl", 'did you mean "mean_kld"?')
    refused(
        here("verify", bundle("demo"), "--html", tmp_path / "none" / "page.html"), 2, "cannot write --html", "no folder"
    )
    refused(here("verify", bundle("demo"), "--text", tmp_path / "none.txt"), 2, "cannot read --text")
    refused(here("verify", bundle("demo"), "--text", short), 2, "verify needs 128 at least", "--text")
    refused(here("verify", tmp_path), 2, "is not a bundle")
