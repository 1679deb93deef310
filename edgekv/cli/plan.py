"""``edgekv plan``: does this model with this context fit that device, how fast, and what does it do to the flash."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from edgekv import device_profiles, settings
from edgekv.device_profiles import DeviceProfile
from edgekv.errors import ProfileError, UsageError
from edgekv.plan import Plan, PlannedModel, Workload, advise, make_plan, read_model
from edgekv.plan.advice import Advice
from edgekv.plan.planner import SUSTAINED_S
from edgekv.runtime.attention.select import attend_options
from edgekv.sizes import format_bytes, format_count
from edgekv.tiers import KVMode

from .options import argument, beginning_with, option
from .output import Facts, print_json, stdout

#: Tokens of an answer, when --prompt does not say how much of the context is prompt.
ANSWER = 256
#: Tokens that are planned for when nothing else is asked, if the model was made for so many.
CONTEXT = 4096
#: Columns that the table of all devices takes.
MATRIX_WIDTH = 112

EPILOG = """
Examples:

`edgekv plan llama.edgekv --profile raspberry-pi-5-8gb --context 16384`

`edgekv plan ./Llama-3.2-3B/config.json --profile galaxy-s24-8gb --context 32768 --weights int4` needs no weights

`edgekv plan ./Qwen3-4B --all-profiles --context 8192 --engine executorch`

`edgekv plan config.json --profile my-board.toml --context 8192 --attend selective:25% --json | jq .plan.decode_tokens_per_s`
"""


def plan_command(
    model: Annotated[Path, argument(settings.FILE, "MODEL", help="A bundle, a Hugging Face folder, or a config.json; weights are not read.")],
    profile: Annotated[str | None, option(settings.PROFILE, "--profile", metavar="NAME|FILE", help="The device; see `edgekv profiles`.")] = None,
    all_profiles: Annotated[bool, typer.Option("--all-profiles", help="One line for every device.")] = False,
    context: Annotated[int | None, option(settings.PLANNED_CONTEXT, "--context", help=f"Tokens in the sequence at the most. Default: {CONTEXT}, or what the model was made for.")] = None,
    prompt: Annotated[int | None, option(settings.PROMPT_TOKENS, "--prompt", help=f"Tokens of it that are read before the first answer. Default: all but {ANSWER}, half at the least.")] = None,
    engine: Annotated[str | None, option(settings.WORD, "--engine", autocompletion=beginning_with(lambda: settings.ENGINE.words), help="onnx or executorch. Default: the bundle's, or onnx.")] = None,
    weights: Annotated[str | None, option(settings.WEIGHTS, "--weights", help="int4, int8, fp16 or fp32. Default: the bundle's, or what `edgekv export` would choose.")] = None,
    attend: Annotated[str, option(settings.ATTEND, "--attend", metavar="exact|selective[:SHARE]", help="As for `edgekv run`.")] = "exact",
    kv: Annotated[KVMode | None, option(settings.KV, "--kv", help="As for `edgekv run`. Default: auto, or int8 where that is faster.")] = None,
    hours_per_day: Annotated[float, option(settings.HOURS_PER_DAY, "--hours-per-day", help="How long it generates each day, for the life of the flash.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:  # fmt: skip
    """Say, before touching hardware, whether a model with a context fits a device, how fast it would be, and what flash takes."""
    if (profile is None) == (not all_profiles):
        raise UsageError("give --profile NAME or --all-profiles; `edgekv profiles` lists them")
    planned = read_model(model, engine=engine, weights=weights)
    longest = planned.geometry.max_context
    if context is None:
        context = min(CONTEXT, longest)
    if context > longest:
        raise UsageError(f"--context {context} is above what the model was made for, {longest}; lower it")
    if prompt is None:
        prompt = max(context - ANSWER, context // 2, 1)
    if prompt > context:
        raise UsageError(f"--prompt {prompt} is more than --context {context}; lower it")
    workload = Workload(context, prompt, hours_per_day, wanted=_wanted(attend, planned), kv=kv)
    if profile is not None:
        device = device_profiles.load(profile)
        plan, advice = make_plan(planned, device, workload), advise(planned, device, workload)
        if as_json:
            print_json({"plan": _data(plan), "advice": {**asdict(advice), "plan": _data(advice.plan)}})
        else:
            _describe(plan, device, advice).print(stdout())
        return
    plans = _all(planned, workload)
    if as_json:
        print_json([_data(plan) for plan in plans])
    else:
        _print_matrix(planned, workload, plans)


def _wanted(attend: str, model: PlannedModel) -> float | None:
    options = attend_options(attend, model.form)
    if not options.selective:
        return None
    if options.share is None:
        raise UsageError(f"--attend {attend}: a plan needs a share of the pages; write selective:25%")
    return options.share


def _all(model: PlannedModel, workload: Workload) -> list[Plan]:
    found, problems = device_profiles.load_many(device_profiles.names())
    if problems:
        raise ProfileError("; ".join(map(str, problems)))
    return [make_plan(model, device, workload) for device in found if model.engine in device.compute]


def _data(plan: Plan) -> dict[str, Any]:
    data = asdict(plan)
    del data["model"]["geometry"]["windows"]
    years = plan.years_of_life
    return {"fits": plan.fits, **data, "years_of_life": years if math.isfinite(years) else None}


def _title(model: PlannedModel) -> str:
    made = "as exported" if model.exported else "estimated"
    return (
        f"{model.source}: {format_count(model.geometry.parameters)} parameters, {model.weights} weights for {model.engine},"
        f" {format_bytes(model.weights_bytes)} ({made})"
    )


def _describe(plan: Plan, device: DeviceProfile, advice: Advice) -> Facts:
    table = Facts()
    off = f"{plan.uncertainty:.0%}"
    table.add_row("model", escape(_title(plan.model)))
    table.add_row("device", escape(f"{device.name}: {device.title}"))
    table.add_row("fits", "[green]yes[/green]" if plan.fits else f"[red]no[/red]: {escape(plan.problem or '')}")
    if plan.fits:
        table.add_row(
            "memory", f"{format_bytes(plan.kv_budget_bytes)} for keys and values after weights, runtime and headroom"
        )
    if plan.fits or plan.decode_tokens_per_s > 0:
        table.add_row("tokens", _tiers(plan, plan.tokens_by_tier, str))
        table.add_row("bytes", _tiers(plan, plan.bytes_by_tier, format_bytes))
        table.add_row("first token", f"{_time(plan.ttft_s)} after a prompt of {plan.workload.prompt} tokens (± {off})")
        table.add_row(
            "speed",
            f"{_speed(plan.decode_tokens_per_s)} tokens/s at {plan.workload.context} tokens (± {off}), bound by {plan.bound_by};"
            f" {_speed(plan.sustained_tokens_per_s)} after {SUSTAINED_S / 60:.0f} minutes of load",
        )
    if plan.fits:
        table.add_row("largest context", _largest(plan))
        table.add_row("flash", _flash(plan))
    table.add_row("recommended", escape(advice.why))
    for command in advice.commands:
        table.add_row("", f"[bold]{escape(command)}[/bold]")
    if advice.plan != plan and advice.commands:
        better = advice.plan
        table.add_row("", f"gives {_speed(better.decode_tokens_per_s)} tokens/s at {better.workload.context} tokens")
    return table


def _tiers(plan: Plan, by_tier: dict[str, int], shown: Any) -> str:
    return ", ".join(f"{shown(count)} {tier}" for tier, count in by_tier.items() if plan.bytes_by_tier[tier])


def _largest(plan: Plan) -> str:
    limit = plan.model.geometry.max_context

    def shown(context: int) -> str:
        return f"{context} tokens" + (
            " (all that the model was made for)" if context + plan.model.page_size > limit else ""
        )

    return (
        f"exact in RAM {shown(plan.largest_exact)}; selective, a quarter of it in RAM, {shown(plan.largest_selective)}"
    )


def _flash(plan: Plan) -> str:
    if not plan.flash_bytes_per_day:
        return "not written to"
    years = plan.years_of_life
    life = f"{years:.0f} years" if years < 100 else "more than 100 years"
    per_day = f"{format_bytes(plan.flash_bytes_per_day)} written a day"
    return f"{per_day} at {plan.workload.hours_per_day:g} h of use: {life} of life"


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.2g}" if tokens_per_s < 10 else f"{tokens_per_s:.0f}"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.2g} s"
        if seconds < 10
        else f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.0f} h"
    )


def _print_matrix(model: PlannedModel, workload: Workload, plans: list[Plan]) -> None:
    console = stdout()
    console.width = max(console.width, MATRIX_WIDTH)  # a line per device
    console.print(escape(f"{_title(model)}; {workload.context} tokens, prompt {workload.prompt}"), highlight=False)
    table = Table("profile", "fits", "first token", "tokens/s", "sustained", "±", "on flash", "life", "exact in RAM", box=None, pad_edge=False)  # fmt: skip
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for plan in plans:
        pages = not plan.fits and plan.decode_tokens_per_s > 0
        fits = "[green]yes[/green]" if plan.fits else "[red]pages[/red]" if pages else "[red]no[/red]"
        if not plan.fits and not pages:
            table.add_row(plan.profile, fits, *["-"] * 7)
            continue
        years = plan.years_of_life
        table.add_row(
            plan.profile,
            fits,
            _time(plan.ttft_s),
            _speed(plan.decode_tokens_per_s),
            _speed(plan.sustained_tokens_per_s),
            f"{plan.uncertainty:.0%}",
            f"{plan.tokens_by_tier['COLD'] / workload.context:.0%}" if plan.fits else "-",
            "-" if not math.isfinite(years) else f"{years:.0f} y" if years < 100 else ">100 y",
            str(plan.largest_exact) if plan.fits else "-",
        )
    console.print(table)
