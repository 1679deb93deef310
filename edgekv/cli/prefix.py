"""`edgekv prefix`: compute a long prompt once, for every run and session that begins with it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from edgekv import settings
from edgekv.errors import UsageError
from edgekv.sizes import format_bytes

from .files import read_text
from .options import argument, option
from .output import print_json, stdout

app = typer.Typer(
    no_args_is_help=True,
    help="Compute a long prompt once: every later run of that bundle that starts with it skips its prefill.",
    epilog="Examples:  edgekv prefix add llama.edgekv --file system_prompt.txt --chat  |  edgekv prefix list",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(
    epilog="Examples:  edgekv prefix add llama.edgekv --file book.txt  |  edgekv prefix add llama.edgekv --file system.txt --chat"
)
def add(
    bundle: Annotated[Path, argument(settings.BUNDLE, "BUNDLE", help="A folder made by `edgekv export`.")],
    file: Annotated[
        Path, option(settings.FILE, "--file", "-f", metavar="FILE", help="The text that prompts begin with.")
    ],
    chat: Annotated[bool, typer.Option("--chat", help="The text is the system message of conversations.")] = False,
    kv_budget: Annotated[
        str | None,
        option(settings.KV_BUDGET, "--kv-budget", metavar="SIZE|SHARE", help="RAM for it while it is computed."),
    ] = None,
    threads: Annotated[
        int | None,
        option(settings.THREADS, "--threads", help="Default: the cores of this process, 4 at the most."),
    ] = None,
    limit: Annotated[
        int | None,
        option(
            settings.PREFIX_BYTES,
            "--limit",
            metavar="SIZE",
            help="All prefixes together; those not used for longest go. Default: $EDGEKV_PREFIX_BYTES or 2GiB.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute a text up to the last multiple of 256 tokens and keep its pages, for runs with INT8 pages."""
    from edgekv.bundle import read_manifest
    from edgekv.runtime.add_prefix import add_prefix
    from edgekv.runtime.chat import system_tokens
    from edgekv.runtime.options import RunOptions
    from edgekv.runtime.system.process import default_threads
    from edgekv.runtime.text import Text

    manifest = read_manifest(bundle)
    text = read_text(file, "--file")
    tokenizer = Text.open(bundle, manifest)
    if chat:
        system = {"role": "system", "content": text}
        tokens = tokenizer.encode_chat([system, {"role": "user", "content": "a"}])[: system_tokens(tokenizer, [system])]
    else:
        tokens = tokenizer.encode(text)
    options = RunOptions(kv_budget=kv_budget, threads=threads or default_threads(), own_process=True)
    path, kept = add_prefix(bundle, tokens, options, name=file.name, limit=limit)
    if as_json:
        typer.echo(json.dumps({"id": path.name, "tokens": kept, "tokens_of_text": len(tokens)}))
    else:
        typer.echo(f"{path.name}: {kept} of {len(tokens)} tokens kept (prefill is cut there); for runs with INT8 pages")


@app.command("list", epilog="Examples:  edgekv prefix list  |  edgekv prefix list --json")
def list_command(as_json: Json = False) -> None:
    """List the prefixes, the last used first."""
    from edgekv.runtime.sessions import prefixes

    found = prefixes.list_prefixes()
    if as_json:
        facts = [{"id": p.path.name, **asdict(p), "path": str(p.path)} for p in found]
        print_json(facts)
        return
    table = Table("id", "made from", "tokens", "on flash", "last used", "checkpoint", box=None, pad_edge=False)
    for p in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(p.used_at))
        size = format_bytes(p.bytes_on_flash)
        table.add_row(p.path.name, escape(p.name), str(p.tokens), size, used, p.checkpoint[:12])
    stdout().print(
        table if found else "no prefixes; make one with: edgekv prefix add BUNDLE --file TEXT", soft_wrap=True
    )


@app.command("rm", epilog="Examples:  edgekv prefix rm 3f2a  |  edgekv prefix rm --all")
def remove(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID...", help="From `edgekv prefix list`; the beginning is enough.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all prefixes.")] = False,
    as_json: Json = False,
) -> None:
    """Remove prefixes. Sessions that began with one keep its pages."""
    from edgekv.runtime.sessions import prefixes

    paths = [p.path for p in prefixes.list_prefixes()]
    if not everything:
        if not ids:
            raise UsageError("name the prefixes to remove, or give --all; edgekv prefix list shows them")
        for wanted in ids:
            if not wanted or sum(path.name.startswith(wanted) for path in paths) != 1:
                raise UsageError(
                    f"{wanted!r} is not the beginning of exactly one prefix; edgekv prefix list shows them"
                )
        paths = [path for path in paths if path.name.startswith(tuple(ids))]
    for path in paths:
        prefixes.remove_prefix(path)
    typer.echo(json.dumps({"removed": [path.name for path in paths]}) if as_json else f"{len(paths)} removed")
