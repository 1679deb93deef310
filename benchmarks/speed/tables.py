"""The tables that a run ends with, in Markdown."""

from __future__ import annotations

from .bars import bars
from .contestants import CONFIGURATIONS, CONTEXTS
from .results import Results


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str = ".0f") -> str:
    return "-" if value is None else format(value, form)


def figure_table(results: Results) -> str:
    """Return decode tok/s, prefill tok/s and peak RSS of every contestant; ~ marks figures without a quiet round."""
    rows = [
        "\ndecode tok/s / prefill tok/s / peak RSS MB\n",
        _row("contestant", *(f"{context} tokens" for context in CONTEXTS), "load s"),
        _row("---", *("---" for _ in CONTEXTS), "---"),
    ]
    for configuration in CONFIGURATIONS:
        cells = []
        for context in CONTEXTS:
            values = [results.get(configuration.name, context, key) for key in ("decode_tok_s", "prefill_tok_s")]
            memory = results.get(configuration.name, context, "peak_rss_mb")
            if memory is None:
                cells.append("-")
                continue
            noisy = "~" if results.noisy(configuration.name, context) else ""
            cells.append(noisy + " / ".join([*(_number(value) for value in values), _number(memory)]))
        loads = [results.get(configuration.name, context, "load_s") for context in CONTEXTS]
        load = next((value for value in loads if value is not None), None)
        rows.append(_row(configuration.name, *cells, _number(load, ".1f")))
    return "\n".join(rows)


def bar_table(results: Results) -> tuple[str, int]:
    """Return the table of the bars, and how many were missed or not measured."""
    rows = [
        "",
        _row("measure", "ours", "theirs", "against", "ratio", "bar", ""),
        _row(*["---"] * 7),
    ]
    missed = 0
    for bar in bars(results):
        missed += not bar.met
        sign = "<=" if bar.at_most else ">="
        verdict = "met" if bar.met else "missed" if bar.ratio is not None else "not measured"
        cells = _number(bar.ours, ".4g"), _number(bar.theirs, ".4g"), bar.against, _number(bar.ratio, ".2f")
        rows.append(_row(bar.measure, *cells, f"{sign} {bar.bar:.2f}", verdict))
    return "\n".join(rows), missed
