"""The verdict as one HTML file: no network, no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from edgekv.sizes import format_bytes

from .chart import Line, line_chart
from .recall import TaskScore
from .report import HEADINGS, failures, sentences, table_rows
from .tasks import DEPTH
from .verdict import Verdict

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --soft: #5d6673; --line: #d9dee5; --paper: #ffffff; --good: #19703a;
  --bad: #b3261e; --c0: #1f5fd0; --c1: #b4540a; --c2: #7a3fb0; --c3: #14806f; --c4: #97742a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa4b2; --line: #343b45; --paper: #15181d;
  --good: #6fce8f; --bad: #ff8a80; --c0: #7aa9ff; --c1: #f2a65a; --c2: #c79bf0; --c3: #5fcdb9; --c4: #d9b86a; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .25rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); } .soft { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } td.n, th.n { text-align: right; white-space: nowrap; }
svg { width: 100%; height: auto; } .grid { stroke: var(--line); } .mark { stroke: var(--soft); stroke-dasharray: 4 4; }
.tick { fill: var(--soft); font-size: 12px; } polyline { fill: none; stroke-width: 2; }
.key { display: inline-block; margin-right: 1.25rem; font-size: .875rem; }
.key::before { content: ""; display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; border-radius: 2px;
  background: var(--c); }
"""


def to_html(verdict: Verdict) -> str:
    """Return the page."""
    passed = verdict.passed
    lines = [
        Line(row.name, row.curve, int(verdict.text["tokens"]))
        for row in verdict.rows
        if row.curve
    ]  # fmt: skip
    colours = "".join(
        f"polyline.s{i} {{ stroke: var(--c{i}); }} circle.s{i} {{ fill: var(--c{i}); }}" for i in range(len(lines))
    )
    keys = "".join(
        f'<span class="key" style="--c: var(--c{i})">{escape(line.name)}</span>' for i, line in enumerate(lines)
    )
    outcome = (
        f'<p class="verdict good">passes the gate “{escape(verdict.gate)}”: {len(verdict.findings)} limits held</p>'
        if passed
        else f'<p class="verdict bad">{escape(failures(verdict))}</p>'
    )
    body = [
        f"<h1>edgekv verify: {escape(_configuration(verdict))}</h1>",
        f'<p class="soft">{escape(_bundle(verdict))}</p>',
        outcome,
        "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences(verdict)) + "</ul>",
        "<h2>KL divergence from the full fp16 cache, by position</h2>",
        f"<p>{keys}</p>",
        line_chart(lines, int(verdict.text["in_chunks"])),
        '<p class="soft">Mean over each span, in nats. Every run is fed the same tokens.</p>',
        "<h2>At equal bytes</h2>",
        _table(HEADINGS, table_rows(verdict), numbers=range(1, 8)),
        "<h2>The gate</h2>",
        _findings(verdict),
        *_answers(verdict),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>edgekv verify: {'passed' if passed else 'failed'}</title><style>{STYLE}{colours}</style></head><body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def _configuration(verdict: Verdict) -> str:
    options = verdict.options
    words = [f"kv {options['kv']}"]
    budget = options["kv_budget"]
    if budget is not None:
        words.append(f"budget {format_bytes(budget) if isinstance(budget, int) else budget}")
        words.append(f"policy {options['policy']}")
    if options["attend"] != "exact":
        words.append(f"attend {options['attend']}")
    if options["allow_drop"]:
        words.append("pages may be dropped")
    return ", ".join(words)


def _bundle(verdict: Verdict) -> str:
    bundle = verdict.bundle
    return (
        f"{bundle['architecture']}, {bundle['engine']}, {bundle['form']}, weights {bundle['weights']}, pages of"
        f" {bundle['page_size']} tokens; source {str(bundle['source_sha256'])[:12]}; seed {verdict.seed}"
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: range = range(0)) -> str:
    def cell(tag: str, index: int, text: str) -> str:
        return f"<{tag}{' class=n' if index in numbers else ''}>{escape(text)}</{tag}>"

    head = "".join(cell("th", index, heading) for index, heading in enumerate(headings))
    lines = ("<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _findings(verdict: Verdict) -> str:
    rows = (
        f"<tr><td>{escape(f.what)}</td><td class=n>{f.measured:.4g}</td><td class=n>{f.relation} {f.allowed:.4g}</td>"
        f'<td class="{"good" if f.passed else "bad"}">{"held" if f.passed else "exceeded"}</td></tr>'
        for f in verdict.findings
    )
    return (
        '<div class="wide"><table><thead><tr><th>what</th><th class=n>measured</th><th class=n>allowed</th><th></th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _answers(verdict: Verdict) -> list[str]:
    """Return the grids of the retrieval tasks that can be measured: the full cache and every row."""
    parts: list[str] = []
    for full in verdict.reference_tasks:
        if not full.measurable:
            continue
        named: list[tuple[str, TaskScore]] = [("full fp16 cache", full)]
        named += [(row.name, score) for row in verdict.rows for score in row.tasks if score.name == full.name]
        parts.append(f"<h2>Answers: {escape(full.name)}</h2>")
        parts.append(_grid(named))
    return parts


def _grid(named: list[tuple[str, TaskScore]]) -> str:
    """Return the right answers of several runs: a line per run and place, a column per depth."""
    cells = named[0][1].cells
    places = list(dict.fromkeys(cell.partition(DEPTH)[0] for cell in cells))
    depths = list(dict.fromkeys(cell.partition(DEPTH)[2] for cell in cells))
    head = "".join(f"<th class=n>{f'depth {depth}' if depth else ''}</th>" for depth in depths)
    lines = []
    for place in places:
        for name, score in named:
            line = f"<td>{escape(place)}</td><td>{escape(name)}</td>"
            for depth in depths:
                right, asked = score.cells[f"{place}{DEPTH}{depth}" if depth else place]
                line += f'<td class="n{"" if right == asked else " bad"}">{right}/{asked}</td>'
            lines.append(f"<tr>{line}</tr>")
    head = f"<thead><tr><th></th><th></th>{head}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'
