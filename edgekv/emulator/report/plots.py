"""Plotly figures in a page that is complete in one file: the library itself lies in it, compressed."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from edgekv.errors import EngineMissing

if TYPE_CHECKING:
    import plotly.graph_objects as go

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1f24; background: #fff;
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .25rem; } .soft { color: #5d6673; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem .3rem 0; text-align: left; border-bottom: 1px solid #d9dee5; vertical-align: top; }
th { color: #5d6673; font-weight: 500; } th, td:first-child { white-space: nowrap; } .figure { min-height: 200px; }
"""

#: Browsers unpack the library since 2023 (DecompressionStream); a third of its size travels.
_LOADER = """
const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), c => c.charCodeAt(0));
new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text().then(code => {
  const script = document.createElement("script"); script.textContent = code; document.head.appendChild(script);
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const options = {responsive: true, displaylogo: false};
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
        margin={"l": 70, "r": 70, "t": 20, "b": 45},
        legend={"orientation": "h", "y": 1.12},
        **layout,
    )
    return drawn


def require_plotly() -> None:
    """Say how to get Plotly when it is missing.

    Raises:
        EngineMissing: it is.
    """
    try:
        import plotly  # noqa: F401
    except ImportError as error:
        raise EngineMissing("pages need Plotly: pip install 'edgekv[report]'") from error
