"""What was measured, as plain data and as a table. No times: equal runs give equal reports."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.table import Table

from edgekv.runtime.attention.select import SelectionStats
from edgekv.sizes import format_bytes

from .divergence import Summary
from .recall import TaskScore
from .source import SourceVerdict
from .verdict import Row, Verdict

#: Version of the JSON.
FORMAT = 1


def to_json(verdict: Verdict) -> dict[str, Any]:
    """Return the verdict as plain data, numbers rounded to six digits."""
    data = {
        **_about(verdict),
        "seed": verdict.seed,
        "partial": verdict.partial,
        "identity": asdict(verdict.identity),
        "greedy": asdict(verdict.greedy),
        "full_cache": {"tasks": [_task(score) for score in verdict.reference_tasks]},
        "rows": [_row(row) for row in verdict.rows],
    }
    rounded: dict[str, Any] = _rounded(data)
    return rounded


def _about(verdict: Verdict | SourceVerdict) -> dict[str, Any]:
    """Return what every report begins with: whether the gate was passed, and what was held against it."""
    return {
        "format": FORMAT,
        "passed": verdict.passed,
        "gate": verdict.gate,
        "findings": [asdict(finding) for finding in verdict.findings],
        "remarks": verdict.remarks,
        "bundle": verdict.bundle,
        "options": verdict.options,
        "text": verdict.text,
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "ram_bytes": row.ram_bytes,
        "flash_bytes": row.flash_bytes,
        "pages_dropped": row.pages_dropped,
        "note": row.note,
        "selection": asdict(row.selection) if row.selection is not None else None,
        "whole_text": _summary(row.all),
        "token_by_token": _summary(row.decode),
        "curve": _curve(row.curve),
        "tasks": [_task(score) for score in row.tasks],
    }


def _summary(summary: Summary | None) -> dict[str, Any] | None:
    if summary is None:
        return None
    return {**asdict(summary), "perplexity_change": summary.perplexity_change}


def _curve(curve: list[tuple[int, float, float]]) -> list[dict[str, Any]]:
    return [{"position": a, "mean_kld": mean, "max_kld": most} for a, mean, most in curve]


def _task(score: TaskScore) -> dict[str, Any]:
    return {
        "name": score.name,
        "right": score.right,
        "asked": score.asked,
        "measurable": score.measurable,
        "cells": {cell: list(counts) for cell, counts in score.cells.items()},
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


HEADINGS = ("", "RAM", "flash", "perplexity", "mean KLD", "99 %", "largest", "top-1", "answers")


def table_rows(verdict: Verdict) -> list[tuple[str, ...]]:
    """Return the cells of the table under HEADINGS: the configuration, then the baselines."""
    rows = []
    for row in verdict.rows:
        if row.all is None:
            rows.append((f"{row.name}: {row.note}", *[""] * 8))
            continue
        right, asked = sum(score.right for score in row.tasks), sum(score.asked for score in row.tasks)
        rows.append(
            (
                row.name,
                format_bytes(row.ram_bytes),
                format_bytes(row.flash_bytes) if row.flash_bytes else "",
                f"{row.all.perplexity_change:+.3%}",
                f"{row.all.mean_kld:.2e}",
                f"{row.all.p99_kld:.2e}",
                f"{row.all.max_kld:.2e}",
                f"{row.all.top1:.2%}",
                f"{right}/{asked}" if asked else "",
            )
        )
    return rows


def sentences(verdict: Verdict) -> list[str]:
    """Return what the table does not say, a sentence each."""
    mine = verdict.rows[0].all
    assert mine is not None
    said = [
        f"{verdict.text['tokens']} tokens, the first {verdict.text['in_chunks']} in chunks, the others one by one; compared"
        f" with the full fp16 cache on the same graph (perplexity {mine.reference_perplexity:.2f})"
    ]
    if verdict.rows[0].selection is not None:
        said.append(_selective(verdict.rows[0].selection))
    if verdict.rows[0].flash_bytes:
        said.append(f"{format_bytes(verdict.rows[0].flash_bytes)} of this configuration are on flash")
    identity, greedy = verdict.identity, verdict.greedy
    if identity.promised or not identity.positions:
        said.append(
            "bit-identical to the same tier without budget or flash"
            if not identity.positions
            else f"{identity.positions} positions differ from the same tier without budget or flash"
        )
    else:
        said.append(f"not bit-identical to the same tier without a budget: {identity.why}")
    if not greedy.tokens:
        return said + verdict.remarks
    if greedy.first_difference is None:
        said.append(f"greedy text: the same {greedy.tokens} tokens as with the full cache")
    else:
        said.append(
            f"greedy text: the same as with the full cache up to token {greedy.first_difference}, of {greedy.tokens}"
        )
    return said + verdict.remarks


def _selective(selection: SelectionStats) -> str:
    share = selection.wanted_per_step / selection.pages_per_step
    mean, most = selection.missing_mean, selection.missing_max
    return (
        f"selective: a step attends to {selection.wanted_per_step:.0f} of {selection.pages_per_step:.0f} pages ({share:.0%}),"
        f" {selection.hit_rate:.1%} of them in RAM; certified: it misses at most {mean.mean:.1%} of the attention (mean of"
        f" layers, heads and steps; 99 % of the steps {mean.p99:.1%}; the worst head {most.max:.1%})"
    )


def source_to_json(verdict: SourceVerdict) -> dict[str, Any]:
    """Return a comparison with the checkpoint as plain data, numbers rounded to six digits."""
    data = {
        **_about(verdict),
        "whole_text": _summary(verdict.all),
        "token_by_token": _summary(verdict.decode),
        "curve": _curve(verdict.curve),
    }
    rounded: dict[str, Any] = _rounded(data)
    return rounded


def source_table(verdict: SourceVerdict) -> Table:
    """Return the table of a comparison with the checkpoint, for a terminal."""
    headings = ("", "perplexity", "change", "mean KLD", "99 %", "largest", "top-1")
    checkpoint = ("checkpoint, float32", f"{verdict.all.reference_perplexity:.2f}", *[""] * 5)
    rows = [
        (
            name,
            f"{part.perplexity:.2f}",
            f"{part.perplexity_change:+.2%}",
            f"{part.mean_kld:.2e}",
            f"{part.p99_kld:.2e}",
            f"{part.max_kld:.2e}",
            f"{part.top1:.1%}",
        )
        for name, part in (("bundle", verdict.all), ("token by token", verdict.decode))
    ]
    return _table(headings, [checkpoint, *rows])


def source_sentences(verdict: SourceVerdict) -> list[str]:
    """Return what that table does not say, a sentence each."""
    kind = f"{verdict.bundle['weights']} weights on {verdict.bundle['engine']}, {verdict.options['kv']} pages"
    read = (
        f"{kind}; {verdict.text['tokens']} tokens, the first {verdict.text['in_chunks']} in chunks, the others one by one;"
        " compared with the checkpoint that was exported"
    )
    return [read, *verdict.remarks]


def failures(verdict: Verdict | SourceVerdict) -> str:
    """Return one line that says why the gate failed."""
    failed = [finding for finding in verdict.findings if not finding.passed]
    more = f" (and {len(failed) - 1} more of {len(verdict.findings)} limits)" if len(failed) > 1 else ""
    return f"the gate '{verdict.gate}' failed: {failed[0]}{more}"


def task_rows(verdict: Verdict) -> list[tuple[str, ...]]:
    """Return a heading, then right answers per measurable task: the full cache, the configuration, the baselines."""
    full = [score for score in verdict.reference_tasks if score.measurable]
    if not full:
        return []
    rows = [("right answers", *(score.name for score in full))]
    named = [("full fp16 cache", full)] + [(row.name, row.tasks) for row in verdict.rows if row.tasks]
    return rows + [(name, *(f"{score.right}/{score.asked}" for score in scores)) for name, scores in named]


def to_tables(verdict: Verdict) -> list[Table]:
    """Return the tables for a terminal."""
    kept = [index for index, heading in enumerate(HEADINGS) if heading not in ("flash", "99 %")]  # 80 columns
    rows = [tuple(cells[index] for index in kept) for cells in table_rows(verdict)]
    tables = [_table(tuple(HEADINGS[index] for index in kept), rows)]
    answers = task_rows(verdict)
    return [*tables, _table(answers[0], answers[1:])] if answers else tables


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=bool(index))
    for cells in rows:
        table.add_row(*cells)
    return table
