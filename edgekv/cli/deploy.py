"""`edgekv deploy`: a bundle onto a device, with all that runs it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from edgekv import settings
from edgekv.bundle import read_manifest
from edgekv.deploy import deploy as steps
from edgekv.deploy.deploy import CALIBRATE, CHECK, FOLDER, DeployOptions, Survey
from edgekv.deploy.device import connect
from edgekv.deploy.target import parse_target
from edgekv.errors import DeviceLost, UsageError
from edgekv.sizes import format_bytes

from .interrupt import Signals
from .options import argument, option
from .output import Facts, print_json, stderr, stdout

EPILOG = """
Examples:

`edgekv deploy llama.edgekv pi@raspberrypi.local`

`edgekv deploy llama.edgekv pi@192.168.1.20:2222 --to /mnt/nvme/edgekv --service`

`edgekv deploy llama.edgekv adb --dry-run`
"""


def deploy_command(
    command: typer.Context,
    bundle: Annotated[Path, argument(settings.BUNDLE, "BUNDLE", help="A folder made by `edgekv export`.")],
    target: Annotated[str, argument(settings.WORD, "TARGET", help="user@host[:port] over ssh, or adb[:SERIAL].")],
    to: Annotated[str, option(FOLDER, "--to", metavar="DIR", help="Folder on the device; a relative one is below the user's home there.")] = "edgekv",
    wheel: Annotated[Path | None, option(settings.FILE, "--wheel", metavar="FILE|DIR", help="edgekv's own wheel for the device, or a folder with some. Default: dist/ of the checkout, or else the package index.")] = None,
    ssh_option: Annotated[list[str] | None, option(settings.WORD, "--ssh-option", metavar="KEY=VALUE", help="As ssh -o; may be given several times. Your ssh configuration holds too.")] = None,
    check: Annotated[str, option(CHECK, "--check", help="greedy: the device must give the tokens of this machine for a short prompt.")] = "greedy",
    calibrate: Annotated[str, option(CALIBRATE, "--calibrate", help="quick: measure the device and bring its profile back, where there is none yet; full: its engine, too.")] = "quick",
    force: Annotated[bool, typer.Option("--force", help="Calibrate again, and overwrite the profile of this name.")] = False,
    service: Annotated[bool, typer.Option("--service", help="Serve the bundle as long as the device runs, by a systemd unit of the user.")] = False,
    serve_options: Annotated[str | None, option(settings.WORD, "--serve-options", help="With --service: options of `edgekv serve`, in one text.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only ask the device, and refuse what cannot work.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found and done as JSON.")] = False,
) -> None:  # fmt: skip
    """Put a bundle onto a device with all that runs it, check its tokens there, and measure it. Only what changed is copied."""
    where = parse_target(target)
    if serve_options is not None and not service:
        raise UsageError("--serve-options is for --service")
    read_manifest(bundle)
    options = DeployOptions(
        folder=_folder(to), own=wheel, check=check, calibrate=calibrate, again=force, serve=_serve_words(serve_options) if service else None
    )  # fmt: skip
    console = stderr()
    with _interrupted_first(command), connect(where, ssh_option or ()) as device:
        if dry_run:
            found = steps.survey(device, bundle, options)
            if as_json:
                print_json(found.to_json())
            else:
                _facts(found).print(stdout())
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=None)
            done = steps.deploy(
                device, where, bundle, options,
                lambda name, sent, total: bar.update(task, description=name, completed=sent, total=total),
                lambda step: bar.reset(task, description=step, total=None),
            )  # fmt: skip
    if as_json:
        print_json(done.to_json())
        return
    _facts(done.survey).print(console)
    _results(done, console)
    print(done.command)


@contextmanager
def _interrupted_first(command: typer.Context) -> Iterator[None]:
    """Ctrl-C reaches ssh, too, which ends: that the device is lost then is not the news."""
    try:
        yield
    except DeviceLost:
        (command.find_object(Signals) or Signals()).check()
        raise


def _folder(text: str) -> str:
    if not text.strip() or text.startswith(("-", "~")) or ":" in text or "'" in text:
        raise UsageError(f"--to must be a folder on the device, without : ' and a ~ or - in front, not {text!r}")
    return text


def _serve_words(text: str | None) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text or ""))
    except ValueError as error:
        raise UsageError(f"--serve-options cannot be read: {error}") from error


def _facts(found: Survey) -> Facts:
    facts, table = found.facts, Facts()
    table.add_row("device", f"{facts.node}: {facts.machine_class}, {facts.libc}, Python {facts.python}")
    table.add_row(
        "memory",
        f"{format_bytes(facts.available_bytes)} of {format_bytes(facts.ram_bytes)} available; {format_bytes(found.kv_bytes)} for keys"
        " and values beside the weights",
    )
    table.add_row("flash", f"{format_bytes(facts.free_flash_bytes)} free at {facts.folder}")
    table.add_row("bundle", f"{format_bytes(found.plan.left)} to copy")
    for note in found.notes:
        table.add_row("", f"[yellow]{note}[/yellow]")
    return table


def _results(done: steps.Deployed, console: Console) -> None:
    table = Facts()
    table.add_row("copied", f"{format_bytes(done.sent_bytes)} (what was there already was not sent)")
    table.add_row("tokens", "not compared" if done.tokens is None else f"{len(done.tokens)} as on this machine")
    if done.profile is not None:
        table.add_row(
            "profile", f"{done.profile.stem}, as in edgekv plan --profile {done.profile.stem}; --force measures anew"
        )
    if done.service is not None:
        table.add_row("service", f"{done.service} runs (systemctl --user status {done.service} there)")
    table.print(console)
