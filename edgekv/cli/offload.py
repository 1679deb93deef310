"""`edgekv offload`: what runs have left in an object store."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from edgekv import settings
from edgekv.errors import UsageError
from edgekv.sizes import format_bytes

from .options import argument, option
from .output import print_json, stdout

app = typer.Typer(
    no_args_is_help=True,
    help="List and remove what runs have left in an object store. A run removes its own objects when it ends; one that was"
    " killed cannot.",
    epilog="Examples:  edgekv offload list s3://bucket/kv  |  edgekv offload rm s3://bucket/kv --older-than 24",
)

Url = Annotated[str, argument(settings.WORD, "URL", help="As given to `edgekv run --offload`.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(
    "list", epilog="Examples:  edgekv offload list s3://bucket/kv  |  edgekv offload list s3://bucket/kv --json"
)
def list_command(url: Url, as_json: Json = False) -> None:
    """List the runs that have objects under a URL, those that are still running included."""
    from edgekv.runtime.storage.objects import list_runs

    found = list_runs(url)
    if as_json:
        print_json([{**asdict(run), "newest": run.newest.isoformat()} for run in found])
        return
    table = Table("run", "objects", "size", "last written", box=None, pad_edge=False)
    for run in found:
        written = run.newest.astimezone().strftime("%Y-%m-%d %H:%M")
        table.add_row(escape(run.name), str(run.objects), format_bytes(run.size_bytes), written)
    stdout().print(table if found else f"nothing of edgekv in {url}", soft_wrap=True)


@app.command(
    "rm",
    epilog="Examples:  edgekv offload rm s3://bucket/kv edgekv-20260102  |  edgekv offload rm s3://bucket/kv --older-than 24",
)
def remove(
    url: Url,
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN...", help="From `edgekv offload list`; the beginning is enough.")
    ] = None,
    older_than: Annotated[
        float | None,
        option(
            settings.OLDER_THAN_H,
            "--older-than",
            metavar="HOURS",
            help="Remove the runs that wrote nothing for so long.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove the objects of runs. One that is still running ends with an error that says so."""
    from edgekv.runtime.storage.objects import delete_run, list_runs

    if bool(runs) == (older_than is not None):
        raise UsageError("name the runs to remove, or give --older-than HOURS; edgekv offload list URL shows them")
    found = list_runs(url)
    for wanted in runs or []:
        if not wanted or sum(run.name.startswith(wanted) for run in found) != 1:
            raise UsageError(
                f"{wanted!r} is not the beginning of exactly one run; edgekv offload list {url} shows them"
            )
    since = datetime.now(timezone.utc) - timedelta(hours=older_than or 0)
    gone = [run.name for run in found if (run.name.startswith(tuple(runs)) if runs else run.newest < since)]
    for name in gone:
        delete_run(url, name)
    typer.echo(json.dumps({"removed": gone}) if as_json else f"{len(gone)} removed")
