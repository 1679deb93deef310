"""Plotly figures in a page that is complete in one file: the library itself lies in it, compressed."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from edgekv.errors import EngineMissing

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: Rows of labels above a plot, and the width of a character in one, as a share of the plot.
LABEL_ROWS = 3
CHARACTER = 1 / 160
#: On an axis.
MOST_TICKS = 9

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1f24; background: #fff;
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .25rem; } .soft { color: #5d6673; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem .3rem 0; text-align: left; border-bottom: 1px solid #d9dee5; vertical-align: top; }
th { color: #5d6673; font-weight: 500; } th, td:not(:last-child) { white-space: nowrap; } .figure { min-height: 200px; }
"""

#: Browsers unpack the library since 2023 (DecompressionStream); a third of its size travels.
_LOADER = """
const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), c => c.charCodeAt(0));
new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text().then(code => {
  const script = document.createElement("script"); script.textContent = code; document.head.appendChild(script);
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const options = {responsive: true, displayModeBar: false};
  return Promise.all(Object.entries(figures).map(([id, f]) => Plotly.newPlot(id, f.data, f.layout, options)));
}).then(() => document.body.dataset.drawn = "yes").catch(error => { document.body.dataset.drawn = String(error); });
"""


def page(title: str, body: Sequence[str], figures: Mapping[str, go.Figure]) -> str:
    """Return a page; ``body`` places each figure with :func:`place`. Equal arguments give equal bytes.

    Raises:
        EngineMissing: Plotly is not installed.
    """
    require_plotly()
    from plotly.offline import get_plotlyjs

    packed = base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
    drawn = json.dumps({name: json.loads(figure.to_json()) for name, figure in figures.items()}).replace("</", "<\\/")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        + "\n".join(body)
        + f'<script type="application/json" id="figures">{drawn}</script>'
        + f'<script type="text/plain" id="plotly">{packed}</script><script>{_LOADER}</script></body></html>\n'
    )


def place(name: str) -> str:
    """Return the element that a figure is drawn in."""
    return f'<div class="figure" id="{name}"></div>'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    lines = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def figure(traces: Sequence[Any], *, height: int = 320, **layout: Any) -> go.Figure:
    """Return a figure in the style of the page."""
    require_plotly()
    import plotly.graph_objects as go

    drawn = go.Figure(list(traces))
    drawn.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 70, "r": 70, "t": 20, "b": 80},
        legend={"orientation": "h", "y": -60 / (height - 100), "yanchor": "top"},
        **layout,
    )
    return drawn


def log_axis(title: str, values: Iterable[float]) -> dict[str, Any]:
    """Return a logarithmic axis over values above zero, whose ticks are whole numbers of 1, 2 and 5."""
    known = [value for value in values if value > 0]
    low, high = (min(known), max(known)) if known else (1.0, 10.0)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    below, above = max(tick for tick in ticks if tick <= low), min(tick for tick in (*ticks, high) if tick >= high)
    shown = [tick for tick in ticks if below <= tick <= above]
    if len(shown) > MOST_TICKS:
        shown = [tick for tick in shown if f"{tick:e}".startswith("1")]
    span = [math.log10(below) - 0.03, math.log10(above) + 0.03]
    labels = [f"{tick:,.10g}" for tick in shown]
    return {"title": title, "type": "log", "tickvals": shown, "ticktext": labels, "range": span}


def mark(drawn: go.Figure, marks: Sequence[tuple[float, str]], seconds: float) -> None:
    """Draw a line at each moment and its label above the plot, in rows, so that none is printed over another."""
    ends = [-1.0] * LABEL_ROWS  # of the last label of each row, as a share of the plot
    labels: list[tuple[float, int, str]] = []
    for at, text in marks:
        drawn.add_vline(x=at, line={"color": "#8b93a0", "width": 1, "dash": "dot"})
        start = at / seconds if seconds else 0.0
        row = next((row for row, end in enumerate(ends) if end < start), None)
        if row is None:
            x, row, before = labels[-1]
            first, _, more = before.partition(" and ")
            labels[-1] = (x, row, f"{first} and {int(more.split()[0] if more else 0) + 1} more")
        else:
            labels.append((at, row, text))
        ends[row] = max(start, ends[row]) + CHARACTER * (len(text) + 2)
    for at, row, text in labels:
        drawn.add_annotation(
            x=at, yref="paper", y=1, yshift=2 + 13 * row, text=text, showarrow=False, xanchor="left", yanchor="bottom",
            font={"size": 10, "color": "#5d6673"},
        )  # fmt: skip
    if labels:
        drawn.update_layout(margin={"t": 20 + 13 * (1 + max(row for _, row, _ in labels))})


def require_plotly() -> None:
    """Say how to get Plotly when it is missing.

    Raises:
        EngineMissing: it is.
    """
    try:
        import plotly  # noqa: F401
    except ImportError as error:
        raise EngineMissing("pages need Plotly: pip install 'edgekv[report]'") from error
