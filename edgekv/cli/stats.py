"""`edgekv stats`: what runs have written to flash, and how long the drive will last at that rate."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from edgekv import settings
from edgekv.sizes import format_bytes

from .options import option
from .output import print_json, stdout

EPILOG = """
Examples:

`edgekv stats` shows the ledger of runs without `--offload`

`edgekv stats /data/offload --profile raspberry-pi-5-8gb`

`edgekv stats chat.kv --profile pixel-8-8gb --json | jq .years_of_life`
"""

#: Days that are listed; the sums count all.
SHOWN_DAYS = 14


def stats_command(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]", help="An offload folder, or a session. Default: the folder of runs without --offload."
        ),
    ] = None,
    profile: Annotated[
        str | None,
        option(
            settings.PROFILE,
            "--profile",
            help="Device whose flash it is: projects the years of life; see `edgekv profiles`.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what runs have written to flash, day by day (UTC), and project how long it will last."""
    from edgekv.runtime.system.process import cache_home

    facts = _facts(folder or cache_home() / "offload", profile)
    if as_json:
        print_json(facts)
        return
    console = stdout()
    table = Table("day (UTC)", "runs", "written", "batch", box=None, pad_edge=False)
    for day in facts["days"][-SHOWN_DAYS:]:
        batch = day["bytes_written"] / max(day["batches"], 1)
        table.add_row(day["day"], str(day["runs"]), format_bytes(day["bytes_written"]), format_bytes(batch))
    console.print(table if facts["days"] else "nothing was written yet")
    if facts["days"]:
        console.print(
            f"{format_bytes(facts['bytes_written'])} in all, {format_bytes(facts['bytes_per_day'])} a day on average",
            highlight=False,
        )
    if facts["damaged_lines"]:
        console.print(f"[yellow]{facts['damaged_lines']} lines of the ledger are damaged and do not count[/yellow]")
    if profile is None:
        console.print("--profile NAME projects the years of life", style="dim")
    else:
        _print_life(console, facts)


def _facts(folder: Path, profile: str | None) -> dict[str, Any]:
    from edgekv.runtime.storage.wear import by_day, bytes_per_day, read_ledger

    entries, damaged = read_ledger(folder)
    days = by_day(entries)
    facts: dict[str, Any] = {
        "folder": str(folder),
        "days": [asdict(day) for day in days],
        "bytes_written": sum(day.bytes_written for day in days),
        "bytes_per_day": bytes_per_day(days),
        "damaged_lines": damaged,
    }
    if profile is not None:
        facts.update(_life(profile, facts["bytes_per_day"], max((day.bytes_written for day in days), default=0)))
    return facts


def _life(profile: str, mean: float, most: float) -> dict[str, Any]:
    from edgekv import device_profiles
    from edgekv.device_profiles.flash import years_of_life

    device = device_profiles.load(profile)

    def years(bytes_per_day: float) -> float | None:
        life = years_of_life(device.flash, bytes_per_day)
        return life if math.isfinite(life) else None  # JSON has no infinity

    return {
        "profile": device.name,
        "endurance_tbw": device.flash.endurance_tbw.value,
        "endurance_confidence": device.flash.endurance_tbw.confidence,
        "years_of_life": years(mean),
        "years_of_life_at_the_busiest_day": years(most),
    }


def _print_life(console: Console, facts: dict[str, Any]) -> None:
    source = f"{facts['profile']}: {facts['endurance_tbw']:g} TB of writes (confidence {facts['endurance_confidence']})"
    mean, most = facts["years_of_life"], facts["years_of_life_at_the_busiest_day"]
    if mean is None:
        console.print(f"{source}; nothing wears it", highlight=False)
        return
    console.print(
        f"{source} last {mean:,.1f} years at this rate, {most:,.1f} if every day were the busiest", highlight=False
    )
