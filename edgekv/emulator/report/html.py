"""A result as an HTML page: memory, speed, flash and pages over the time of the device."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekv.sizes import binary_unit

from ..play.result import PageMap, Result
from .plots import figure, log_axis, mark, page, place, require_plotly, table
from .terminal import TURN_HEADINGS, rows, sentences, turn_rows

if TYPE_CHECKING:
    import plotly.graph_objects as go

INK = "#1c1f24"
#: By :class:`~edgekv.tiers.Tier`; the first is for no page.
TIER_COLOURS = ("#f1f3f6", "#d6453d", "#f0a13a", "#3f7fd0", "#7a4fb5", "#2b2f36")
#: What was so at a sample is so until the next one.
HELD = {"shape": "hv"}
TIER_NAMES = ("none", "HOT", "WARM", "COLD", "REMOTE", "DROPPED")


def to_html(result: Result, model: str) -> str:
    """Return the page.

    Args:
        model: what ran: the name of its bundle or configuration.

    Raises:
        EngineMissing: Plotly is not installed.
    """
    require_plotly()
    figures: dict[str, go.Figure] = {}
    title = f"{model} on {result.device['title']}: {result.scenario.title}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_what_ran(result))}; edgekv emulate</p>',
        "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences(result)) + "</ul>",
        table(("", ""), list(rows(result))),
        "<h2>Turns</h2>",
        table(TURN_HEADINGS, list(turn_rows(result))),
    ]
    if result.log:
        body += [
            "<h2>What happened</h2>",
            table(
                ("at", "event", "what happened"),
                [(f"{e['at_s']:.2f} s", e["kind"], e["text"]) for e in result.log],
            ),
        ]
    if result.samples.get("at_s"):
        figures |= {
            "memory": _memory(result),
            "cache": _cache(result.samples),
            "speed": _speed(result.samples),
            "pages": _pages(result.samples),
            "flash": _flash(result),
        }
        for drawn in figures.values():
            mark(drawn, [(entry["at_s"], entry["kind"]) for entry in result.log], result.totals["seconds"])
            drawn.update_xaxes(range=[0, result.totals["seconds"]])
        body += ["<h2>Memory of the app</h2>", place("memory"), "<h2>Keys and values</h2>", place("cache")]
        body += ["<h2>Speed</h2>", place("speed")]
        body += [
            "<h2>Pages that attention read</h2>",
            place("pages"),
            "<h2>Flash traffic and wear</h2>",
            place("flash"),
        ]
    if result.pages is not None:
        figures |= {"tiers": _tiers(result.pages), "use": _use(result.pages)}
        body += ["<h2>Pages at the end: tier</h2>", place("tiers")]
        body += ["<h2>Pages at the end: share of their layer's attention</h2>", place("use")]
    return page(title, body, figures)


def _what_ran(result: Result) -> str:
    model, turns = result.model, result.scenario.turns
    most = max(turn.max_tokens for turn in turns)
    spoken = f"{len(turns)} turns" if len(turns) > 1 else f"a prompt of {result.turns[0].prompt_tokens:,} tokens"
    return (
        f"{model['architecture']}, {model['n_layers']} layers, {model['weights']} weights; {spoken},"
        f" at most {most:,} tokens {'in each answer' if len(turns) > 1 else 'generated'}"
    )


def _memory(result: Result) -> go.Figure:
    samples = result.samples
    at = samples["at_s"]
    cache = [hot + warm for hot, warm in zip(samples["hot_bytes"], samples["warm_bytes"], strict=True)]
    unit, (cache, rss, limit) = _in_one_unit(cache, samples["rss_bytes"], samples["limit_bytes"])
    traces = [
        _area(at, cache, "keys and values", TIER_COLOURS[2], "hv"),
        _line(at, rss, "resident set", {"color": INK, **HELD}),
        _line(at, limit, "limit", {"color": "#b3261e", "dash": "dash", **HELD}),
    ]
    return figure(traces, xaxis_title="seconds", yaxis={"title": unit, "rangemode": "tozero"}, hovermode="x unified")


def _cache(samples: dict[str, list[Any]]) -> go.Figure:
    at = samples["at_s"]
    unit, (hot, warm, cold) = _in_one_unit(samples["hot_bytes"], samples["warm_bytes"], samples["cold_bytes"])
    traces = [
        _area(at, hot, "HOT pages", TIER_COLOURS[1], "hv"),
        _area(at, warm, "WARM pages", TIER_COLOURS[2], "hv"),
        _line(at, cold, "COLD pages, on flash", {"color": TIER_COLOURS[3], "dash": "dot", **HELD}),
    ]
    return figure(traces, xaxis_title="seconds", yaxis={"title": unit, "rangemode": "tozero"}, hovermode="x unified")


def _speed(samples: dict[str, list[Any]]) -> go.Figure:
    at, step = np.array(samples["at_s"]), np.array(samples["step_s"])
    ran, one = step > 0, np.array(samples["step_tokens"]) == 1
    rate = np.array(samples["step_tokens"]) / np.maximum(step, 1e-12)
    traces = [
        _dots(at[ran & one], rate[ran & one], "decode", TIER_COLOURS[3]),
        _dots(at[ran & ~one], rate[ran & ~one], "prompt", TIER_COLOURS[1]),
        _line(
            samples["at_s"], samples["speed"], "speed that heat leaves", {"color": "#b4540a", "dash": "dot"}, yaxis="y2"
        ),
    ]
    right = {
        "title": "of the cold speed", "overlaying": "y", "side": "right", "range": [0, 1.05], "showgrid": False,
        "tickformat": ".0%", "tickmode": "array", "tickvals": [0, 0.25, 0.5, 0.75, 1],
    }  # fmt: skip
    return figure(traces, xaxis_title="seconds", yaxis=log_axis("tokens/s", rate[ran].tolist()), yaxis2=right)


def _pages(samples: dict[str, list[Any]]) -> go.Figure:
    used, fetched = (np.diff(samples[name], prepend=0) for name in ("pages_used", "pages_fetched"))
    traces = [
        _area(samples["at_s"], (used - fetched).tolist(), "hits: in memory", "#19703a", "vh"),
        _area(samples["at_s"], fetched.tolist(), "faults: from flash", TIER_COLOURS[3], "vh"),
    ]
    return figure(traces, xaxis_title="seconds", yaxis_title="pages between samples", hovermode="x unified")


def _flash(result: Result) -> go.Figure:
    samples, totals = result.samples, result.totals
    at, written = samples["at_s"], np.array(samples["bytes_written"], np.float64)
    wear = written / max(totals["bytes_written"], 1) * totals["wear_share"]
    unit, (read, put) = _in_one_unit(samples["bytes_read"], samples["bytes_written"])
    traces = [
        _line(at, read, "read", {"color": TIER_COLOURS[3]}),
        _line(at, put, "written", {"color": TIER_COLOURS[1]}),
    ]
    left = {"title": f"{unit} since the start", "rangemode": "tozero"}
    if not totals["bytes_written"]:
        return figure(traces, xaxis_title="seconds", yaxis=left, hovermode="x unified")
    traces.append(_line(at, wear.tolist(), "endurance used", {"color": "#7a3fb0", "dash": "dot"}, yaxis="y2"))
    right = {
        "title": "share of the endurance", "overlaying": "y", "side": "right", "tickformat": ".1e", "showgrid": False,
        "rangemode": "tozero", "tickmode": "auto", "nticks": 5,
    }  # fmt: skip
    return figure(traces, xaxis_title="seconds", yaxis=left, yaxis2=right, hovermode="x unified")


def _tiers(pages: PageMap) -> go.Figure:
    import plotly.graph_objects as go

    steps = len(TIER_COLOURS)
    scale = [[(index + side) / steps, colour] for index, colour in enumerate(TIER_COLOURS) for side in (0, 1)]
    tier = (np.array(pages.tier) + 1).tolist()
    names = [[TIER_NAMES[value] for value in row] for row in tier]
    trace = go.Heatmap(
        z=tier,
        x0=pages.tokens_per_column / 2,
        dx=pages.tokens_per_column,
        text=names,
        zmin=-0.5,
        zmax=steps - 0.5,
        colorscale=scale,
        colorbar={"tickvals": list(range(steps)), "ticktext": list(TIER_NAMES)},
        hovertemplate="layer %{y}, around token %{x}: %{text}<extra></extra>",
    )
    return _map_of(trace, pages)


def _use(pages: PageMap) -> go.Figure:
    import plotly.graph_objects as go

    use = np.log10(np.maximum(np.array(pages.use), 1e-6))
    trace = go.Heatmap(
        z=use.round(3).tolist(),
        x0=pages.tokens_per_column / 2,
        dx=pages.tokens_per_column,
        colorscale="Viridis",
        colorbar={
            "title": "share",
            "tickvals": list(range(-6, 1)),
            "ticktext": [f"1e{power}" for power in range(-6, 1)],
        },
        hovertemplate="layer %{y}, around token %{x}: 10^%{z:.2f}<extra></extra>",
    )
    return _map_of(trace, pages)


def _map_of(trace: Any, pages: PageMap) -> go.Figure:
    layers = len(pages.tier)
    return figure(
        [trace],
        height=min(160 + 14 * layers, 700),
        xaxis_title="position in the text (tokens)",
        yaxis={"title": "layer", "autorange": "reversed", "dtick": max(1, layers // 8)},
    )


def _line(at: list[Any], values: list[Any], name: str, line: dict[str, Any], **more: Any) -> Any:
    import plotly.graph_objects as go

    return go.Scatter(x=at, y=values, name=name, line=line, **more)


def _area(at: list[Any], values: list[Any], name: str, colour: str, shape: str) -> Any:
    import plotly.graph_objects as go

    line = {"width": 0, "color": colour, "shape": shape}
    return go.Scatter(x=at, y=values, name=name, stackgroup="pages", line=line)


def _dots(at: NDArray[np.float64], values: NDArray[np.float64], name: str, colour: str) -> Any:
    import plotly.graph_objects as go

    return go.Scatter(x=at.tolist(), y=values.tolist(), name=name, mode="markers", marker={"size": 4, "color": colour})


def _in_one_unit(*series: list[Any]) -> tuple[str, list[list[float]]]:
    """Return the unit that fits the largest of all bytes, and the series in it."""
    unit, factor = binary_unit(max((value for values in series for value in values), default=0))
    return unit, [[value / factor for value in values] for values in series]
