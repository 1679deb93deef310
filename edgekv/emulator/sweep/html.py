"""A sweep as a page: speed and waiting by context, one line per device and setting, and every case in a table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from edgekv.sizes import format_bytes

from ..report.plots import figure, page, place, require_plotly, table

if TYPE_CHECKING:
    import plotly.graph_objects as go

HEADINGS = (
    "device", "context", "policy", "KV budget", "attend", "first token", "tokens/s", "1 of 100 takes", "in memory", "peak",
    "written", "error",
)  # fmt: skip


def to_html(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return the page.

    Raises:
        EngineMissing: Plotly is not installed.
    """
    require_plotly()
    charts = {
        "decode": ("Decode, tokens/s", "decode_tokens_per_s"),
        "ttft": ("Time to the first token, s", "ttft_s"),
        "hits": ("Pages that attention found in memory", "hit_rate"),
    }
    body = [f"<h1>{escape(title)}</h1>", f'<p class="soft">edgekv sweep, {len(rows)} cases</p>']
    for name, (heading, _) in charts.items():
        body += [f"<h2>{heading}</h2>", place(name)]
    body += ["<h2>All cases</h2>", table(HEADINGS, list(map(cells, rows)))]
    return page(title, body, {name: _chart(rows, column) for name, (_, column) in charts.items()})


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row as texts under :data:`HEADINGS`."""
    setting = (row["profile"], f"{row['context']:,}", row["policy"], row["kv_budget"], row["attend"])
    if row["ttft_s"] is None:
        return (*setting, *[""] * 6, row["error"] or "")
    return (
        *setting,
        f"{row['ttft_s']:.1f} s",
        f"{row['decode_tokens_per_s']:.1f}",
        f"{row['decode_p99_s'] * 1e3:.0f} ms",
        f"{row['hit_rate']:.0%}",
        format_bytes(row["peak_bytes"]),
        format_bytes(row["bytes_written"]),
        row["error"] or "",
    )


def _chart(rows: Sequence[dict[str, Any]], column: str) -> go.Figure:
    import plotly.graph_objects as go

    varying = [name for name in ("policy", "kv_budget", "attend") if len({row[name] for row in rows}) > 1]
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row[column] is not None and not row["error"]:
            lines.setdefault(", ".join([row["profile"], *(row[name] for name in varying)]), []).append(
                (row["context"], row[column])
            )
    traces = [
        go.Scatter(x=[x for x, _ in sorted(points)], y=[y for _, y in sorted(points)], name=name, mode="lines+markers")
        for name, points in lines.items()
    ]
    share: dict[str, Any] = {"type": "linear", "tickformat": ".0%", "rangemode": "tozero"}
    contexts = sorted({row["context"] for row in rows})
    across: dict[str, Any] = {"tickvals": contexts, "ticktext": [f"{context:,}" for context in contexts]}
    drawn = figure(
        traces,
        height=380,
        xaxis={"title": "context (tokens)", "type": "log", **across},
        yaxis=share if column == "hit_rate" else {"type": "log", "dtick": "D2"},
    )
    drawn.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "font": {"size": 10}}, margin={"r": 20})
    return drawn
