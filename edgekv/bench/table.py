"""A measurement as a table to paste into an issue (Markdown), and as data for scripts (JSON, CSV)."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from typing import Any

from edgekv.device_profiles.geometry import Geometry
from edgekv.runtime.pages.manager import WRITE_BATCH_BYTES
from edgekv.sizes import format_bytes, format_count

from .measurement import Bench, Result

#: Columns whose numbers stand below each other.
_NUMBERS = {"size", "threads", "t/s", "flash read/token", "flash written/token"}


def to_json(bench: Bench) -> dict[str, Any]:
    """Return what was measured as plain data."""
    return {
        **_facts(bench),
        "environment": asdict(bench.environment),
        "results": [
            {**_row(result), "samples": [asdict(sample) for sample in result.samples]} for result in bench.results
        ],
    }


def to_csv(bench: Bench) -> str:
    """Return a row for each test, each with all that is known of it."""
    rows = [{**_facts(bench), **asdict(bench.environment), **_row(result)} for result in bench.results]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(bench: Bench) -> str:
    """Return the table, and below it what it was measured on and how."""
    rows = [_cells(bench, result) for result in bench.results]
    widths = {name: max(len(name), 4, *(len(row[name]) for row in rows)) for name in rows[0]}

    def line(cells: dict[str, str]) -> str:
        padded = (
            text.rjust(widths[name]) if name in _NUMBERS else text.ljust(widths[name]) for name, text in cells.items()
        )
        return f"| {' | '.join(padded)} |"

    rule = {name: "-" * (width - 1) + (":" if name in _NUMBERS else "-") for name, width in widths.items()}
    table = [line({name: name for name in widths}), line(rule), *map(line, rows)]
    return "\n".join([*table, "", *(f"- {sentence}" for sentence in _sentences(bench))]) + "\n"


def _facts(bench: Bench) -> dict[str, Any]:
    manifest = bench.manifest
    return {
        "model": bench.name,
        "architecture": manifest.model.architecture,
        "parameters": Geometry.from_model(manifest.model).parameters,
        "weights_bytes": manifest.weights_bytes(),
        "form": manifest.form,
        "weights": manifest.weights,
        "operators": manifest.operators,
        "page_size": manifest.page_size,
        "kv": bench.kv,
        "kv_budget_bytes": bench.plan.budget_bytes if bench.limited else None,
        "context": bench.context,
        "threads": bench.options.threads,
        "repeat": bench.repeat,
        "peak_rss_bytes": bench.peak_rss_bytes,
        "budget_changes": bench.budget_changes,
    }


def _row(result: Result) -> dict[str, Any]:
    return {
        "test": result.case.name,
        "kind": result.case.kind,
        "tokens": result.case.tokens,
        "depth": result.case.depth,
        "tokens_per_s": result.tokens_per_s,
        "spread": result.spread,
        "slowest": min(result.rates),
        "fastest": max(result.rates),
        "flash_read_bytes_per_token": result.read_bytes_per_token,
        "flash_written_bytes_per_token": result.written_bytes_per_token,
    }


def _cells(bench: Bench, result: Result) -> dict[str, str]:
    facts = _facts(bench)
    weights = facts["weights"] + (f", {facts['operators']}" if facts["operators"] else "")
    cells = {
        "model": f"{bench.name}, {facts['architecture']} {format_count(facts['parameters'])}",
        "size": format_bytes(facts["weights_bytes"]),
        "engine": bench.environment.engine + (", inline" if facts["form"] == "inline" else ""),
        "weights": weights,
        "kv": bench.kv + (f", {format_bytes(bench.plan.budget_bytes)}" if bench.limited else ""),
        "threads": str(bench.options.threads),
        "test": result.case.name,
        "t/s": f"{result.tokens_per_s:.2f}" + (f" ± {result.spread:.2f}" if bench.repeat > 1 else ""),
    }
    if bench.limited:
        cells["flash read/token"] = format_bytes(result.read_bytes_per_token)
        cells["flash written/token"] = format_bytes(result.written_bytes_per_token)
    return {name: text.replace("|", "\\|") for name, text in cells.items()}


def _sentences(bench: Bench) -> list[str]:
    found = bench.environment
    commit = f" at {found.commit}" if found.commit else ""
    cores = f"{found.cores} core" + ("s" if found.cores > 1 else "")
    often = f"median ± median absolute deviation of {bench.repeat}" if bench.repeat > 1 else "measured once"
    budget = (
        f"a budget of {format_bytes(bench.plan.budget_bytes)} for keys and values of {bench.context} tokens"
        if bench.limited
        else f"no budget, {bench.context} tokens"
    )
    sentences = [
        f"edgekv {found.edgekv_version}{commit}, {found.kernels} kernels, {found.engine}, Python {found.python_version}",
        f"{found.processor}, {cores}, {format_bytes(found.ram_bytes)} RAM; {found.system}",
        f"{format_bytes(bench.peak_rss_bytes)} peak memory of the process; {budget}",
        f"tokens/s, {often}; pp reads a prompt, tg generates, @ d behind so many tokens in the cache",
    ]
    if bench.limited and not bench.plan.fits:
        sentences.append(
            f"flash is written in batches of up to {format_bytes(WRITE_BATCH_BYTES)}: a test in which none falls writes nothing"
        )
    if bench.budget_changes:
        sentences.append(f"memory was short meanwhile: the budget was changed {bench.budget_changes} times")
    return sentences
