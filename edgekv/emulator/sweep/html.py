"""A sweep as a page: speed and waiting by context, one line per device and setting, and every case in a table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from edgekv.sizes import format_bytes

from ..report.plots import figure, log_axis, page, place, require_plotly, table

if TYPE_CHECKING:
    import plotly.graph_objects as go

HEADINGS = (
    "device", "context", "policy", "KV budget", "attend", "first token", "tokens/s", "1 of 100 takes", "in memory", "peak",
    "written", "error",
)  # fmt: skip

#: A device has a colour, and beyond these a symbol too; a setting has a dash.
COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#5f6a72", "#a3a61d", "#17becf",
    "#0b3c78", "#8f3b00", "#0f5c2e", "#7b0f26", "#4b2a7b", "#b08968",
)  # fmt: skip
SYMBOLS = ("circle", "square", "diamond", "x", "triangle-up")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
#: Height of a line of a legend, in pixels.
LEGEND_LINE = 20
#: Of the width of a plot, for the label of a context.
LABEL_SHARE = 0.06


def to_html(model: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return the page.

    Args:
        model: what ran: the name of its bundle or configuration.

    Raises:
        EngineMissing: Plotly is not installed.
    """
    require_plotly()
    charts = {
        "decode": ("Decode", "decode_tokens_per_s", "tokens/s"),
        "ttft": ("Time to the first token", "ttft_s", "seconds"),
        "hits": ("Pages that attention found in memory", "hit_rate", "share"),
    }
    devices = len({row["profile"] for row in rows})
    title = f"{model} on {devices} devices" if devices > 1 else f"{model} on {rows[0]['profile']}"
    body = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(_what_ran(rows))}; edgekv sweep</p>']
    for name, (heading, _, _) in charts.items():
        body += [f"<h2>{heading}</h2>", place(name)]
    body += ["<h2>All cases</h2>", table(HEADINGS, list(map(cells, rows)))]
    return page(title, body, {name: _chart(rows, column, unit) for name, (_, column, unit) in charts.items()})


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


def _what_ran(rows: Sequence[dict[str, Any]]) -> str:
    """Say what the cases were: what they share, and what they differ in."""
    said = [f"{len(rows)} cases"]
    for name, words in (
        ("context", "tokens of context"),
        ("policy", ""),
        ("kv_budget", "of KV budget"),
        ("attend", "attention"),
    ):
        values = list(dict.fromkeys(row[name] for row in rows))
        listed = ", ".join(f"{value:,}" if isinstance(value, int) else value for value in values)
        said.append(f"{listed} {words}".strip().replace("device of KV budget", "the KV budget that the device leaves"))
    generated = ", ".join(f"{count:,}" for count in dict.fromkeys(row["max_tokens"] for row in rows))
    return "; ".join([*said, f"{generated} tokens to generate"])


def _apart(contexts: Sequence[int]) -> list[int]:
    """Return those whose labels leave room for each other on a logarithmic axis, the largest first of all."""
    most, kept = contexts[-1], [contexts[-1]]
    least_ratio = (most / contexts[0]) ** LABEL_SHARE
    for context in reversed(contexts[:-1]):
        if kept[-1] / context >= least_ratio:
            kept.append(context)
    return kept[::-1]


def _chart(rows: Sequence[dict[str, Any]], column: str, unit: str) -> go.Figure:
    import plotly.graph_objects as go

    varying = [name for name in ("policy", "kv_budget", "attend") if len({row[name] for row in rows}) > 1]
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row[column] is not None and not row["error"]:
            setting = ", ".join(row[name] for name in varying)
            lines.setdefault((row["profile"], setting), []).append((row["context"], row[column]))
    devices = list(dict.fromkeys(row["profile"] for row in rows))
    settings = list(dict.fromkeys(setting for _, setting in lines))
    traces = [
        go.Scatter(
            x=[x for x, _ in sorted(points)],
            y=[y for _, y in sorted(points)],
            name=", ".join(filter(None, (device, setting))),
            mode="lines+markers",
            line={
                "color": COLOURS[devices.index(device) % len(COLOURS)],
                "dash": DASHES[settings.index(setting) % len(DASHES)],
            },
            marker={"symbol": SYMBOLS[devices.index(device) // len(COLOURS) % len(SYMBOLS)], "size": 7},
        )
        for (device, setting), points in lines.items()
    ]
    share: dict[str, Any] = {"title": unit, "type": "linear", "tickformat": ".0%", "rangemode": "tozero"}
    contexts = _apart(sorted({row["context"] for row in rows}))
    across: dict[str, Any] = {"tickvals": contexts, "ticktext": [f"{context:,}" for context in contexts]}
    values = [value for points in lines.values() for _, value in points]
    drawn = figure(
        traces,
        height=max(380, 120 + LEGEND_LINE * len(traces)),
        xaxis={"title": "context (tokens)", "type": "log", **across},
        yaxis=share if column == "hit_rate" else log_axis(unit, values),
        showlegend=True,
    )
    drawn.update_layout(
        legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top", "font": {"size": 10}},
        margin={"r": 20, "b": 45},
    )
    return drawn
