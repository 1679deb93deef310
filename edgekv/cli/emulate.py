"""`edgekv emulate`: run a bundle, or a model that is only a config.json, on a device that is not here."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edgekv import settings
from edgekv.errors import UsageError
from edgekv.tiers import KVMode

from .files import read_text, write_text
from .options import argument, option
from .output import print_json_line, stderr, stdout

EPILOG = """
Examples:

`edgekv emulate demo.edgekv --profile android-low-4gb --kv-budget 25% --prompt-tokens 2000`

`edgekv emulate llama.edgekv --profile raspberry-pi-5-8gb --scenario examples/scenarios/kill.toml --report kill.html`

`edgekv emulate Llama-3.2-3B/config.json --profile galaxy-s24-8gb --context 32768 --max-tokens 1000` needs no weights

`edgekv emulate demo.edgekv --profile android-low-4gb --json | jq .totals`

`edgekv emulate demo.edgekv --profile android-low-4gb --jail` also gives the process no more real memory than the device does
"""


def emulate_command(
    model: Annotated[Path, argument(settings.FILE, "MODEL", help="A folder made by `edgekv export`, or the config.json of a Hugging Face model: then memory, flash and time are computed without weights, and no text comes out.")],
    profile: Annotated[str, option(settings.PROFILE, "--profile", help="The device: a name (`edgekv profiles`) or a file.")],
    scenario: Annotated[Path | None, option(settings.FILE, "--scenario", metavar="FILE", help="Turns and events, in TOML; docs/emulator.md. Default: one prompt.")] = None,
    prompt: Annotated[str | None, option(settings.PROMPT, "--prompt", "-p", help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, option(settings.FILE, "--prompt-file", "-f", help="Read the prompt from a file.")] = None,
    prompt_tokens: Annotated[int | None, option(settings.PROMPT_TOKENS, "--prompt-tokens", help="A prompt of so many tokens, drawn by the seed. Default: what --context leaves, or 512.")] = None,
    max_tokens: Annotated[int, option(settings.MAX_TOKENS, "--max-tokens", "-n", help="Tokens to generate at the most.")] = 128,
    context: Annotated[int | None, option(settings.CONTEXT, "--context", help="Tokens in the conversation at the most. Default: what the turns need.")] = None,
    kv_budget: Annotated[str | None, option(settings.KV_BUDGET, "--kv-budget", help="As in `edgekv run`. Default: what the device leaves.")] = None,
    kv: Annotated[KVMode | None, option(settings.KV, "--kv", help="As in `edgekv run`.")] = None,
    policy: Annotated[str | None, option(settings.POLICY, "--policy", help="As in `edgekv run`.")] = None,
    attend: Annotated[str | None, option(settings.ATTEND, "--attend", metavar="exact|selective[:LIMIT]", help="As in `edgekv run`.")] = None,
    allow_drop: Annotated[bool | None, typer.Option("--allow-drop/--no-allow-drop", help="As in `edgekv run`.")] = None,
    session: Annotated[Path | None, option(settings.FILE, "--session", metavar="FILE", help="As in `edgekv run`: the app keeps its conversation here and goes on with it after a kill.")] = None,
    app_limit: Annotated[int | None, option(settings.APP_LIMIT, "--app-limit", help="What the system grants the app, instead of the profile's number.")] = None,
    engine: Annotated[str, option(settings.ENGINE, "--engine", help="For a config.json: onnx or executorch.")] = "onnx",
    weights: Annotated[str, option(settings.WEIGHTS, "--weights", help="For a config.json: int4, int8, fp16 or fp32.")] = "int4",
    page_size: Annotated[int, option(settings.PAGE_SIZE, "--page-size", help="For a config.json: tokens per page.")] = 32,
    seed: Annotated[int, option(settings.SEED, "--seed", help="Of drawn prompts and faults. Equal seeds give equal reports, to the byte.")] = 0,
    report: Annotated[Path | None, option(settings.FILE, "--report", metavar="FILE.html", help="Write a page with charts, complete in one file. Needs edgekv[report].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    jail: Annotated[bool, typer.Option("--jail", help="Also hold this process to the real memory that the device grants, by a cgroup or rlimit.")] = False,
) -> None:  # fmt: skip
    """Run the real runtime on an emulated device: time, memory, flash and heat are computed, everything else happens."""
    from edgekv.emulator.device import Device
    from edgekv.emulator.play.play import emulate, emulate_shape
    from edgekv.emulator.play.scenario import Scenario, Turn, load_scenario
    from edgekv.emulator.play.shape_app import read_shape
    from edgekv.emulator.report.terminal import sentences, to_tables

    given = [name for name, value in (("--prompt", prompt), ("--prompt-file", prompt_file),
             ("--prompt-tokens", prompt_tokens), ("--scenario", scenario)) if value is not None]  # fmt: skip
    if len(given) > 1:
        raise UsageError(f"give one of {' and '.join(given)}, not both")
    if scenario is not None:
        played = load_scenario(scenario)
    else:
        text = read_text(prompt_file, "--prompt-file") if prompt_file is not None else prompt
        drawn = None if text is not None else prompt_tokens or max((context or 0) - max_tokens, 0) or 512
        played = Scenario((Turn(prompt=text, prompt_tokens=drawn, max_tokens=max_tokens),))
    settings = {
        "kv_budget": kv_budget, "kv": kv.value if kv is not None else None, "policy": policy, "attend": attend,
        "context": context, "allow_drop": allow_drop, "session": True if session is not None else None,
    }  # fmt: skip
    changes = {name: value for name, value in settings.items() if value is not None}
    played = replace(played, app=replace(played.app, **changes))  # type: ignore[arg-type]
    if jail:
        _in_jail(profile, app_limit)
        return
    errors = stderr()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("emulating", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        device = Device(profile, app_limit=app_limit, seed=seed)
        if model.is_file():
            shape = read_shape(model, engine=engine, weights=weights, page_size=page_size)
            result = emulate_shape(shape, device, played, seed=seed, progress=advance)
        else:
            result = emulate(model, device, played, seed=seed, session=session, progress=advance)
    if report is not None:
        from edgekv.emulator.report.html import to_html

        write_text(report, to_html(result, model.name), "--report")
    if as_json:
        print_json_line(result.to_json())
        return
    console = stdout()
    for table in to_tables(result):
        console.print(table, end="\n\n", highlight=False)
    for sentence in sentences(result):
        console.print(sentence, highlight=False)


def _in_jail(profile: str, app_limit: int | None) -> None:
    """Run this very command again, without --jail, in one."""
    from edgekv.device_profiles import load
    from edgekv.jail import check, run_limited

    limit_bytes = app_limit if app_limit is not None else load(profile).memory.app_limit_bytes.value
    arguments = [argument for argument in sys.argv[1:] if argument != "--jail"]
    sentence = run_limited([sys.executable, "-m", "edgekv", *arguments], limit_bytes)
    print(sentence, file=sys.stderr)
    check(sentence)
