"""`edgekv bench`: tokens per second of a bundle on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edgekv import settings
from edgekv.bench import workload
from edgekv.bench.workload import Numbers, Workload
from edgekv.errors import UsageError
from edgekv.tiers import KVMode

from .options import argument, option
from .output import print_json, stderr

#: What is measured when nobody says; tests like pp512 are what people compare.
PROMPTS, GENERATED, DEPTHS = Numbers((512,)), Numbers((64,)), Numbers((0,))

EPILOG = """
Examples:

`edgekv bench demo.edgekv`

`edgekv bench llama.edgekv -p 512,2048 -n 64 -d 0,4096`

`edgekv bench llama.edgekv -p 0 -d 4096 --kv-budget 25%` generates with more than half of the cache on flash

`edgekv bench llama.edgekv --csv > bench.csv`
"""


def bench_command(
    bundle: Annotated[Path, argument(settings.BUNDLE, "BUNDLE", help="A folder made by `edgekv export`.")],
    prompt_tokens: Annotated[Numbers, option(workload.PROMPTS, "--prompt-tokens", "-p", help="Prompts that are read (pp512), in tokens; 0 for none.")] = PROMPTS,
    generate: Annotated[Numbers, option(workload.GENERATED, "--generate", "-n", help="Tokens that are generated (tg64); 0 for none.")] = GENERATED,
    depth: Annotated[Numbers, option(workload.DEPTHS, "--depth", "-d", help="Tokens in the cache before, computed but not timed: each of the above at each depth.")] = DEPTHS,
    kv_budget: Annotated[str | None, option(settings.KV_BUDGET, "--kv-budget", help="As in `edgekv run`: 64MiB, or 25% of the fp16 cache of the deepest measurement.")] = None,
    kv: Annotated[KVMode, option(settings.KV, "--kv", help="As in `edgekv run`.")] = KVMode.AUTO,
    offload: Annotated[Path | None, option(settings.FILE, "--offload", metavar="DIR", help="As in `edgekv run`: a folder on the drive that is to be measured.")] = None,
    threads: Annotated[int | None, option(settings.THREADS, "--threads", help="Default: the cores of this process, 4 at the most.")] = None,
    repeat: Annotated[int, option(workload.REPEAT, "--repeat", "-r", help="Repetitions, of which the median counts.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every repetition, instead of a table.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a row for each test, with all facts, instead of a table.")] = False,
) -> None:  # fmt: skip
    """Measure tokens/s of reading prompts and of generating, at depths, with memory and flash: a table to paste into an issue."""
    from edgekv.bench.measurement import measure
    from edgekv.bench.table import to_csv, to_json, to_markdown
    from edgekv.runtime.generate import RunOptions, default_threads

    if as_json and as_csv:
        raise UsageError("give --json or --csv, not both")
    wanted = Workload(prompt_tokens, generate, depth, repeat)
    options = RunOptions(
        kv_budget=kv_budget, kv=kv, offload=offload, threads=threads or default_threads(), own_process=True
    )
    console = stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # It is drawn between measurements, not by a thread of its own, which would take time from them.
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, auto_refresh=False
    ) as bar:
        task = bar.add_task("", total=None)

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total, refresh=True)

        found = measure(bundle, wanted, options, advance)
    if as_json:
        print_json(to_json(found))
    else:
        print(to_csv(found) if as_csv else to_markdown(found), end="")
