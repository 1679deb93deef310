"""`edgekv sweep`: many emulated runs at once, as a table and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from edgekv import settings
from edgekv.errors import EdgeKVError, UsageError

from .files import check_writable, write_text
from .options import argument, beginning_with, option, profile_names
from .output import print_json_line, stderr, stdout

EPILOG = """
Examples:

`edgekv sweep Llama-3.2-3B/config.json --profiles all --contexts 4096,32768 --out sweep.csv`

`edgekv sweep llama.edgekv --profiles galaxy-s24-8gb,raspberry-pi-5-8gb --contexts 8192 --policies lru,heavy --budgets device,256MiB --out sweep.parquet --page sweep.html`

`edgekv sweep config.json --profiles all --contexts 32768 --out sweep.csv --scheduler tcp://10.0.0.5:8786`
"""


def sweep_command(
    model: Annotated[Path, argument(settings.FILE, "MODEL", help="The config.json of a Hugging Face model, or a bundle, of which only the shape is used.")],
    profiles: Annotated[str, option(settings.WORD, "--profiles", metavar="A,B|all", autocompletion=beginning_with(lambda: ["all", *profile_names()], listed=True), help="Devices: names or files.")],
    contexts: Annotated[str, option(settings.WORD, "--contexts", metavar="N,N", help="Tokens, prompt and answer together.")],
    out: Annotated[Path, option(settings.FILE, "--out", metavar="FILE", help="Where the table goes: .csv or .parquet. Cases that it holds are not run again.")],
    policies: Annotated[str, option(settings.WORD, "--policies", metavar="A,B", autocompletion=beginning_with(lambda: settings.POLICY.words, listed=True), help="lru, heavy, window, random.")] = "lru",
    budgets: Annotated[str, option(settings.WORD, "--budgets", metavar="A,B", help="KV budgets, as in `edgekv run`; device is what the device leaves.")] = "device",
    attends: Annotated[str, option(settings.WORD, "--attends", metavar="A,B", help="exact, selective:25%, ...")] = "exact",
    max_tokens: Annotated[int, option(settings.MAX_TOKENS, "--max-tokens", "-n", help="Tokens to generate in each case.")] = 64,
    engine: Annotated[str, option(settings.ENGINE, "--engine", help="For a config.json: onnx or executorch.")] = "onnx",
    weights: Annotated[str, option(settings.WEIGHTS, "--weights", help="For a config.json: int4, int8, fp16 or fp32.")] = "int4",
    page_size: Annotated[int, option(settings.PAGE_SIZE, "--page-size", help="For a config.json: tokens per page.")] = 32,
    seed: Annotated[int, option(settings.SEED, "--seed", help="Equal seeds give equal tables.")] = 0,
    page: Annotated[Path | None, option(settings.FILE, "--page", metavar="FILE.html", help="Also write a page that compares the cases, complete in one file.")] = None,
    scheduler: Annotated[str | None, option(settings.WORD, "--scheduler", metavar="ADDRESS", help="A dask scheduler, such as tcp://10.0.0.5:8786, whose workers have edgekv. Default: processes on this machine.")] = None,
    workers: Annotated[int | None, option(settings.WORKERS, "--workers", help="Processes on this machine. Default: its cores.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as one JSON list instead of a table.")] = False,
) -> None:  # fmt: skip
    """Emulate every combination of devices, contexts, policies and budgets, without weights. Interrupted, it goes on where it was."""
    from edgekv.device_profiles import names
    from edgekv.emulator.play.shape_app import read_shape, shape_of
    from edgekv.emulator.report.plots import require_plotly
    from edgekv.emulator.sweep.case import all_cases
    from edgekv.emulator.sweep.html import to_html
    from edgekv.emulator.sweep.sweep import sweep

    if page is not None:
        if page.resolve() == out.resolve():
            raise UsageError(f"--page and --out are one file, {out}; give the page another name")
        require_plotly()
        check_writable(page, "--page")
    chosen = names() if profiles == "all" else _words(profiles)
    cases = all_cases(
        chosen, [settings.CONTEXT.read(word, "--contexts") for word in _words(contexts)], _words(policies), _words(budgets), _words(attends),
        max_tokens=max_tokens, seed=seed,
    )  # fmt: skip
    shape = (
        read_shape(model, engine=engine, weights=weights, page_size=page_size) if model.is_file() else shape_of(model)
    )
    errors = stderr()
    columns = (TextColumn("emulating"), BarColumn(), MofNCompleteColumn(), TextColumn("cases"), TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("sweep", total=len(cases))
        before: list[int] = []

        def advance(done: int, total: int) -> None:
            before.append(done)
            bar.update(task, completed=done, total=total)

        rows = sweep(shape, cases, out, scheduler=scheduler, workers=workers, progress=advance)
    errors.print(f"{len(cases)} cases, {before[0]} of them done before; {out}", style="dim", highlight=False)
    if page is not None:
        write_text(page, to_html(model.name, rows), "--page")
    if as_json:
        print_json_line(rows)
    else:
        _print_table(rows)
    if all(row["ttft_s"] is None for row in rows):
        raise EdgeKVError(f"none of the {len(rows)} cases could be run; of the first: {rows[0]['error']}")


def _print_table(rows: list[dict[str, Any]]) -> None:
    from edgekv.emulator.sweep.html import HEADINGS, cells

    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=True)
    for row in rows:
        *numbers, why = cells(row)
        table.add_row(*numbers, why.partition(":")[0])  # the rest is in the table that was written
    console = stdout()
    console.width = max(console.width, 200)  # a line per case; a pager or a wide window shows it whole
    console.print(table)


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UsageError(f"an empty list: {text!r}; write it like a,b")
    return words
