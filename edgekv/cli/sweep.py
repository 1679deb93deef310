"""`edgekv sweep`: many emulated runs at once, as a table and a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from edgekv.errors import UsageError

EPILOG = """
Examples:

`edgekv sweep Llama-3.2-3B/config.json --profiles all --contexts 4096,32768 --out sweep.csv`

`edgekv sweep llama.edgekv --profiles galaxy-s24-8gb,raspberry-pi-5-8gb --contexts 8192 --policies lru,heavy --budgets device,256MiB --out sweep.parquet --page sweep.html`

`edgekv sweep config.json --profiles all --contexts 32768 --out sweep.csv --scheduler tcp://10.0.0.5:8786`
"""


def sweep_command(
    model: Annotated[Path, typer.Argument(help="The config.json of a Hugging Face model, or a bundle, of which only the shape is used.")],
    profiles: Annotated[str, typer.Option("--profiles", metavar="A,B|all", help="Devices: names or files.")],
    contexts: Annotated[str, typer.Option("--contexts", metavar="N,N", help="Tokens, prompt and answer together.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the table goes: .csv or .parquet. Cases that it holds are not run again.")],
    policies: Annotated[str, typer.Option("--policies", metavar="A,B", help="lru, heavy, window, random.")] = "lru",
    budgets: Annotated[str, typer.Option("--budgets", metavar="A,B", help="KV budgets, as in `edgekv run`; device is what the device leaves.")] = "device",
    attends: Annotated[str, typer.Option("--attends", metavar="A,B", help="exact, selective:25%, ...")] = "exact",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Tokens to generate in each case.")] = 64,
    engine: Annotated[str, typer.Option("--engine", help="For a config.json: onnx or executorch.")] = "onnx",
    weights: Annotated[str, typer.Option("--weights", help="For a config.json: int4, int8, fp16 or fp32.")] = "int4",
    page_size: Annotated[int, typer.Option("--page-size", min=4, help="For a config.json: tokens per page.")] = 32,
    seed: Annotated[int, typer.Option("--seed", help="Equal seeds give equal tables.")] = 0,
    page: Annotated[Path | None, typer.Option("--page", metavar="FILE.html", help="Also write a page that compares the cases, complete in one file.")] = None,
    scheduler: Annotated[str | None, typer.Option("--scheduler", metavar="ADDRESS", help="A dask scheduler, such as tcp://10.0.0.5:8786, whose workers have edgekv. Default: processes on this machine.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes on this machine. Default: its cores.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as one JSON list instead of a table.")] = False,
) -> None:  # fmt: skip
    """Emulate every combination of devices, contexts, policies and budgets, without weights. Interrupted, it goes on where it was."""
    from edgekv.device_profiles import names
    from edgekv.emulator.play.shape_app import read_shape, shape_of
    from edgekv.emulator.sweep.html import HEADINGS, cells, to_html
    from edgekv.emulator.sweep.sweep import all_cases, sweep

    chosen = names() if profiles == "all" else _words(profiles)
    cases = all_cases(
        chosen, [_number(word) for word in _words(contexts)], _words(policies), _words(budgets), _words(attends),
        max_tokens=max_tokens, seed=seed,
    )  # fmt: skip
    shape = (
        read_shape(model, engine=engine, weights=weights, page_size=page_size) if model.is_file() else shape_of(model)
    )
    errors = Console(stderr=True)
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
        try:
            page.write_text(to_html(f"{model.name}: {len(chosen)} devices", rows), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {page}: {error.strerror}; give --page another path") from error
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=True)
    for row in rows:
        *numbers, why = cells(row)
        table.add_row(*numbers, why.partition(":")[0])  # the rest is in the table that was written
    console = Console()
    console.width = max(console.width, 200)  # a line per case; a pager or a wide window shows it whole
    console.print(table)


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UsageError(f"an empty list: {text!r}; write it like a,b")
    return words


def _number(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise UsageError(f"--contexts: {word!r} is not a number of tokens")
    return int(word)
