"""`edgekv verify`: what a configuration costs in quality, held against a gate."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edgekv.errors import EdgeKVError, GateFailed, UsageError
from edgekv.tiers import KVMode

EPILOG = """
Examples:

`edgekv verify demo.edgekv`

`edgekv verify llama.edgekv --kv-budget 25% --text my_documents.txt --html report.html`

`edgekv verify llama.edgekv --kv-budget 25% --attend selective:25%`

`edgekv verify llama.edgekv --kv-budget 25% --allow-drop --policy window --gate my_gate.toml --json > report.json`
"""


def verify_command(
    bundle: Annotated[Path, typer.Argument(help="A folder made by `edgekv export`.")],
    gate: Annotated[str, typer.Option("--gate", metavar="strict|standard|FILE", help="What must be kept: a named gate, or a TOML file.")] = "standard",
    text: Annotated[Path | None, typer.Option("--text", help="What is read. Default: pages of two novels that come with edgekv.")] = None,
    kv: Annotated[KVMode, typer.Option("--kv", help="The configuration, as in `edgekv run`.")] = KVMode.INT8,
    kv_budget: Annotated[str | None, typer.Option("--kv-budget", metavar="SIZE|SHARE", help="As in `edgekv run`: 64MiB, or 25% of the fp16 cache of the text.")] = None,
    policy: Annotated[str, typer.Option("--policy", help="As in `edgekv run`.")] = "lru",
    allow_drop: Annotated[bool, typer.Option("--allow-drop", help="As in `edgekv run`: forget pages that do not fit.")] = False,
    attend: Annotated[str, typer.Option("--attend", metavar="exact|selective[:LIMIT]", help="As in `edgekv run`.")] = "exact",
    offload: Annotated[Path | None, typer.Option("--offload", metavar="DIR", help="As in `edgekv run`.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Default: the cores of this process, 4 at the most.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the retrieval tasks. Equal seeds give equal reports.")] = 0,
    tokens: Annotated[int | None, typer.Option("--tokens", min=128, help="Tokens of the text that are read. Default: 4096; 640 with --quick.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A short text, few questions, no baselines.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with curves and tables, complete in one file.")] = None,
) -> None:  # fmt: skip
    """Compare a configuration with the full fp16 cache, on your text. Exit code 1 when the gate fails."""
    from edgekv.runtime.generate import RunOptions, default_threads
    from edgekv.verify.gate import load_gate
    from edgekv.verify.html import to_html
    from edgekv.verify.judge import QUICK, Settings, verify
    from edgekv.verify.report import failures, sentences, to_json, to_tables

    limits = load_gate(gate)
    options = RunOptions(
        kv=kv, kv_budget=kv_budget, policy=policy, allow_drop=allow_drop, attend=attend, offload=offload,
        threads=threads or default_threads(),
    )  # fmt: skip
    settings = replace(QUICK if quick else Settings(), seed=seed)
    if tokens is not None:
        settings = replace(settings, tokens=tokens, decode=min(settings.decode, tokens // 2))
    content = _read(text)
    if html is not None:
        _check_writable(html)
    errors = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        bars: dict[str, int] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in bars:
                bars[phase] = progress.add_task(phase, total=total)
            progress.update(bars[phase], completed=done, total=total)  # type: ignore[arg-type]

        verdict = verify(bundle, options, limits, settings, text=content, advance=advance)
    if html is not None:
        try:
            html.write_text(to_html(verdict), encoding="utf-8")
        except OSError as error:
            raise EdgeKVError(f"cannot write {html}: {error.strerror}; give --html another path") from error
        errors.print(f"the page is in {html}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(to_json(verdict), indent=1))
    else:
        console = Console()
        for table in to_tables(verdict):
            console.print(table)
            console.print()
        for sentence in sentences(verdict):
            console.print(f"- {sentence}", highlight=False, soft_wrap=True)
    if not verdict.passed:
        raise GateFailed(failures(verdict))
    errors.print(f"the gate '{limits.name}' is passed: {len(verdict.findings)} limits held", style="green")


def _read(text: Path | None) -> str | None:
    try:
        return None if text is None else text.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read --text {text}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"cannot read --text {text}: it is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


def _check_writable(path: Path) -> None:
    """Say now, not after minutes, that the page cannot be written."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "it is a folder" if path.is_dir() else f"{folder} is no folder that can be written to"
        raise UsageError(f"cannot write --html {path}: {reason}")
