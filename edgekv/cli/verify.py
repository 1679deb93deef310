"""`edgekv verify`: what a configuration costs in quality, held against a gate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edgekv import settings
from edgekv.errors import GateFailed, UsageError
from edgekv.tiers import KVMode

from .files import check_writable, read_text, write_text
from .options import argument, option
from .output import print_json, stderr, stdout

EPILOG = """
Examples:

`edgekv verify demo.edgekv`

`edgekv verify llama.edgekv --kv-budget 25% --text my_documents.txt --html report.html`

`edgekv verify llama.edgekv --kv-budget 25% --attend selective:25%`

`edgekv verify llama.edgekv --reference ./Llama-3.2-1B`   what int4 weights and INT8 pages cost against the checkpoint

`edgekv verify llama.edgekv --kv-budget 25% --allow-drop --policy window --gate my_gate.toml --json > report.json`
"""


def verify_command(
    bundle: Annotated[Path, argument(settings.BUNDLE, "BUNDLE", help="A folder made by `edgekv export`.")],
    reference: Annotated[str | None, option(settings.WORD, "--reference", metavar="SOURCE", help="Compare with the checkpoint that was exported, in float: what weights and cache cost together. A folder, a GGUF file, a name on the hub, or `demo`, as in `edgekv export`.")] = None,
    gate: Annotated[str | None, option(settings.WORD, "--gate", metavar="strict|standard|weights|FILE", help="What must be kept: a named gate, or a TOML file. Default: standard; weights with --reference.")] = None,
    text: Annotated[Path | None, option(settings.FILE, "--text", help="What is read. Default: pages of two novels that come with edgekv.")] = None,
    kv: Annotated[KVMode, option(settings.KV, "--kv", help="The configuration, as in `edgekv run`.")] = KVMode.INT8,
    kv_budget: Annotated[str | None, option(settings.KV_BUDGET, "--kv-budget", help="As in `edgekv run`: 64MiB, or 25% of the fp16 cache of the text.")] = None,
    policy: Annotated[str, option(settings.POLICY, "--policy", help="As in `edgekv run`.")] = "lru",
    allow_drop: Annotated[bool, typer.Option("--allow-drop", help="As in `edgekv run`: forget pages that do not fit.")] = False,
    attend: Annotated[str, option(settings.ATTEND, "--attend", metavar="exact|selective[:LIMIT]", help="As in `edgekv run`.")] = "exact",
    offload: Annotated[Path | None, option(settings.FILE, "--offload", metavar="DIR", help="As in `edgekv run`.")] = None,
    threads: Annotated[int | None, option(settings.THREADS, "--threads", help="Default: the cores of this process, 4 at the most.")] = None,
    seed: Annotated[int, option(settings.SEED, "--seed", help="Of the retrieval tasks. Equal seeds give equal reports.")] = 0,
    tokens: Annotated[int | None, option(settings.VERIFY_TOKENS, "--tokens", help="Tokens of the text that are read. Default: 4096; 640 with --quick.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A short text, few questions, no baselines.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    html: Annotated[Path | None, option(settings.FILE, "--html", metavar="FILE", help="Write a page with curves and tables, complete in one file.")] = None,
) -> None:  # fmt: skip
    """Compare a configuration with the full fp16 cache, or with the checkpoint, on your text. Exit code 1 when the gate fails."""
    from edgekv.runtime.generate import RunOptions, default_threads
    from edgekv.verify import report
    from edgekv.verify.gate import load_gate
    from edgekv.verify.html import to_html
    from edgekv.verify.judge import QUICK, Settings, verify
    from edgekv.verify.source import SourceVerdict, verify_source
    from edgekv.verify.verdict import Verdict

    if reference is not None and html is not None:
        raise UsageError("--html is a page about the cache; with --reference there is a table, or --json")
    limits = load_gate(gate or ("weights" if reference is not None else "standard"))
    options = RunOptions(
        kv=kv, kv_budget=kv_budget, policy=policy, allow_drop=allow_drop, attend=attend, offload=offload,
        threads=threads or default_threads(),
    )  # fmt: skip
    settings = replace(QUICK if quick else Settings(), seed=seed)
    if tokens is not None:
        settings = replace(settings, tokens=tokens, decode=min(settings.decode, tokens // 2))
    content = read_text(text, "--text") if text is not None else None
    if html is not None:
        check_writable(html, "--html")
    errors = stderr()
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

        verdict: Verdict | SourceVerdict
        if reference is not None:
            verdict = verify_source(bundle, reference, options, limits, settings, text=content, advance=advance)
            data, tables, said = (
                report.source_to_json(verdict),
                [report.source_table(verdict)],
                report.source_sentences(verdict),
            )
        else:
            verdict = verify(bundle, options, limits, settings, text=content, advance=advance)
            data, tables, said = report.to_json(verdict), report.to_tables(verdict), report.sentences(verdict)
            if html is not None:
                write_text(html, to_html(verdict), "--html")
    if html is not None:
        errors.print(f"the page is in {html}", highlight=False, soft_wrap=True)
    if as_json:
        print_json(data)
    else:
        console = stdout()
        for table in tables:
            console.print(table)
            console.print()
        for sentence in said:
            console.print(f"- {sentence}", highlight=False, soft_wrap=True)
    if not verdict.passed:
        raise GateFailed(report.failures(verdict))
    errors.print(f"the gate '{limits.name}' is passed: {len(verdict.findings)} limits held", style="green")
