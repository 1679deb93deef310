"""Predicted against published tokens per second, per device and engine.

For every pair the device model is fitted to the published rows, and each row is also predicted by a fit that never saw its model
(leave-one-model-out, on all devices). Prints the mean absolute percentage error of both, apart. Rows that exceed their device's
RAM go through the paging model and are counted apart. Usage:

    python -m benchmarks.predictions.published [--rows MORE.csv] [--add MORE.csv] [--misses] [--json]

``--rows``: predict the rows of another file of the same columns, with fits to the shipped rows only. ``--add``: treat them as
shipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .published_fit import Fit, fit_decode, fit_prefill
from .published_rows import Row, read_rows

#: A pair counts as calibrated with this many rows; the bars of its mean errors.
CALIBRATED_ROWS, BARS = 5, {"decode": 0.10, "prefill": 0.20}


@dataclass(frozen=True)
class Prediction:
    """One row of one kind; ``held_out`` is None if no other model could be fitted to."""

    device: str
    engine: str
    model: str
    kind: str
    paged: bool
    published: float
    fitted: float | None
    held_out: float | None


def predictions(rows: Sequence[Row], unseen: Sequence[Row] = ()) -> list[Prediction]:
    """Predict every row, fitted to it and held out; rows of ``unseen`` are predicted and never fitted to."""
    engines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        engines[row.engine].append(row)
    made = []
    for row in unseen or rows:
        same = engines[row.engine]
        fitted = None if unseen else _fits(row.device, tuple(same))
        held_out = _fits(row.device, tuple(other for other in same if unseen or other.base != row.base))
        for kind in BARS:
            if getattr(row, kind) is not None:
                made.append(_made(row, kind, _predict(row, kind, fitted), _predict(row, kind, held_out)))
    return made


@cache
def _fits(device: str, rows: tuple[Row, ...]) -> dict[str, Fit | None]:
    """Fit decode and prefill on one device to the rows of an engine."""
    here, elsewhere = [row for row in rows if row.device == device], [row for row in rows if row.device != device]
    decode = fit_decode([row for row in here if row.decode is not None], elsewhere)
    flash = decode.flash if decode is not None else None
    prefill = fit_prefill([row for row in here if row.prefill is not None], flash, elsewhere)
    return {"decode": decode, "prefill": prefill}


def _predict(row: Row, kind: str, fits: dict[str, Fit | None] | None) -> float | None:
    fitted = fits[kind] if fits is not None else None
    if fitted is None or (row.paged and fitted.flash is None):
        return None
    return fitted.tokens_per_s(row)


def _made(row: Row, kind: str, fitted: float | None, held_out: float | None) -> Prediction:
    # Prefill reads the weights once per prompt: paging slows it little, and its rows count with the others.
    paged = row.paged and kind == "decode"
    return Prediction(*row.pair, row.model, kind, paged, getattr(row, kind), fitted, held_out)


def error(predicted: float, published: float) -> float:
    """Return the absolute relative error."""
    return abs(predicted / published - 1)


@dataclass(frozen=True)
class Score:
    """Mean absolute errors, as shares, of one pair's rows of one kind."""

    device: str
    engine: str
    kind: str
    paged: bool
    rows: int
    fitted: float | None
    held_out_rows: int
    held_out: float | None

    @property
    def verdict(self) -> str:
        """Whether a calibrated pair meets the bar on rows that were held out."""
        if self.paged or self.held_out is None or self.rows < CALIBRATED_ROWS:
            return ""
        return "met" if self.held_out <= BARS[self.kind] else "missed"


def scores(made: Sequence[Prediction]) -> list[Score]:
    """Return the mean errors per device, engine, kind, and whether the model was paged."""
    groups: dict[tuple[str, str, str, bool], list[Prediction]] = defaultdict(list)
    for one in made:
        groups[one.device, one.engine, one.kind, one.paged].append(one)
    return [
        Score(
            *key,
            len(group),
            _mean([error(one.fitted, one.published) for one in group if one.fitted is not None]),
            sum(one.held_out is not None for one in group),
            _mean([error(one.held_out, one.published) for one in group if one.held_out is not None]),
        )
        for key, group in sorted(groups.items(), key=lambda item: (item[0][3], item[0][2], -len(item[1]), item[0]))
    ]


def _mean(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="predict these rows instead, by fits to the shipped ones")
    parser.add_argument("--add", type=Path, help="rows to fit and to hold out beside the shipped ones")
    parser.add_argument("--misses", action="store_true", help="also list every row that is off by more than its bar")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    rows, left_out = read_rows()
    if given.add:
        more, more_left_out = read_rows(given.add)
        rows, left_out = rows + more, left_out + more_left_out
    unseen: list[Row] = []
    if given.rows:
        unseen, left_out = read_rows(given.rows)
    made = predictions(rows, unseen)
    table = scores(made)
    if given.json:
        data = {
            "scores": [{**asdict(score), "verdict": score.verdict} for score in table],
            "rows": [asdict(one) for one in made],
            "left_out": left_out,
        }
        print(json.dumps(data, indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(_table(table))
    console.print(
        f"{len(made)} predictions of {len({one.model for one in made})} models; {len(left_out)} rows left out:"
    )
    for reason in sorted({reason for _, reason in left_out}):
        console.print(f"  {sum(why == reason for _, why in left_out)} x {reason}", highlight=False)
    if given.misses:
        for one in made:
            if one.held_out is not None and error(one.held_out, one.published) > BARS[one.kind]:
                off = one.held_out / one.published - 1
                figures = f"{one.held_out:.3g} against {one.published:.3g} ({off:+.0%})"
                line = f"  {one.device}, {one.engine}, {one.model}: {one.kind} {figures}"
                console.print(line, highlight=False, markup=False)


def _table(table: Sequence[Score]) -> Table:
    shown = Table(
        "device", "engine", "of", "rows", "fitted", "held out", "rows held out", "bar", box=None, pad_edge=False
    )
    for column in (3, 4, 5, 6):
        shown.columns[column].justify = "right"
    for score in table:
        kind = f"{score.kind}, paged" if score.paged else score.kind
        errors = ["-" if value is None else f"{value:.1%}" for value in (score.fitted, score.held_out)]
        shown.add_row(
            score.device, score.engine, kind, str(score.rows), *errors, str(score.held_out_rows), score.verdict
        )
    return shown


if __name__ == "__main__":
    main()
