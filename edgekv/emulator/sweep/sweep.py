"""Many weightless runs at once: every combination of profiles, contexts, policies, budgets; resumed where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from edgekv.host import usable_cores

from ..play.shape_app import Shape
from .case import Case, Row
from .cluster import rows_there
from .journal import Journal
from .processes import rows_here
from .table import check_kind, read_rows, write_rows


def sweep(
    shape: Shape,
    cases: Sequence[Case],
    out: Path,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Run the cases that ``out`` and its journal do not hold yet; returns the rows of all, in the order of the cases.

    Each case is in the journal (``OUT.partial``) as soon as it is done, so that an interrupted sweep goes on where it was. At the
    end the rows are written to ``out``, atomically, behind those of other sweeps that it held, and the journal goes.

    Args:
        out: ``.csv`` or ``.parquet``. scheduler: address of a dask scheduler; None: ``workers`` processes here.

    Raises:
        UsageError: ``out`` is of another kind, no table of a sweep, or cannot be written. StoreLocked: another sweep writes it.
        EngineMissing: edgekv[sweep] is not installed. EdgeKVError: no room, or a process was killed; what is done is kept.
    """
    check_kind(out)
    if out.is_symlink():
        out = out.resolve()  # one table has one journal, by whatever name
    asked = {case.key(shape): case for case in cases}
    with Journal(out) as journal:
        done = {row["key"]: row for row in [*read_rows(out), *journal.rows()]}
        missing = [case for key, case in asked.items() if key not in done]
        count = len(asked) - len(missing)
        progress(count, len(asked))
        made = (
            rows_there(shape, missing, scheduler)
            if scheduler is not None
            else rows_here(shape, missing, workers or usable_cores())
        )
        with closing(made):
            for row in made if missing else ():
                journal.add(row)
                done[row["key"]] = row
                count += 1
                progress(count, len(asked))
        rows = [done[key] for key in asked]
        write_rows(out, [*(row for key, row in done.items() if key not in asked), *rows])
        journal.remove()
    return rows
