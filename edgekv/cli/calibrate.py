"""``edgekv profiles calibrate``: measure this machine and write what was found as a profile."""

from __future__ import annotations

import datetime
import platform
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edgekv.device_profiles import load, user_dir
from edgekv.device_profiles.schema import KINDS
from edgekv.errors import ProfileError, UsageError

from .profiles import show

EPILOG = """
Examples:

`edgekv profiles calibrate` writes ~/.config/edgekv/profiles/HOSTNAME.toml

`edgekv profiles calibrate --bundle llama.edgekv --out my-board.toml` also measures the engine

`edgekv profiles calibrate --dir /mnt/nvme --name my-nvme`
"""


def calibrate_command(
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="The profile to write. Default: among your profiles, under the host's name.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="The profile's name. Default: the file's, or the host's.")] = None,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="Also measure the engine with this bundle.")] = None,
    folder: Annotated[Path | None, typer.Option("--dir", metavar="DIR", help="A folder on the drive to measure. Default: where `edgekv run` offloads to.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Default: as for `edgekv run`.")] = None,
    kind: Annotated[str, typer.Option("--kind", help=", ".join(KINDS))] = "laptop",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a profile.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not print the profile.")] = False,
) -> None:  # fmt: skip
    """Measure this machine in under a minute (memory, matrices, attention, drive) and write a profile."""
    from edgekv.calibrate import calibrate, profile_toml
    from edgekv.runtime.system.process import cache_home, default_threads

    if kind not in KINDS:
        raise UsageError(f"unknown kind {kind!r}; use one of {', '.join(KINDS)}")
    path, name = _target(out, name)
    if path.exists() and not force:
        raise UsageError(f"{path} exists; choose another with --out or --name, or overwrite it with --force")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        found = calibrate(folder or cache_home() / "offload", threads or default_threads(), bundle, progress)
    title = f"{platform.node() or 'this machine'}: {platform.machine()}, {found.threads} threads, {found.isa}"
    text = profile_toml(found, name=name, title=title, kind=kind, date=datetime.date.today().isoformat())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ProfileError(f"cannot write {path}: {error.strerror}; choose another with --out") from error
    load(path)
    if not quiet:
        show(str(path))
    console.print(f"wrote {path}; use it with --profile {path if out else name}", highlight=False, soft_wrap=True)


def _target(out: Path | None, name: str | None) -> tuple[Path, str]:
    """Return the file and the profile's name, which is the file's."""
    if out is not None:
        if out.suffix != ".toml" or (name is not None and name != out.stem):
            raise UsageError(f"--out {out} must be named {name or 'NAME'}.toml: a profile has its file's name")
        return out, out.stem
    name = name or re.sub(r"[^a-z0-9]+", "-", platform.node().lower()).strip("-") or "this-machine"
    return user_dir() / f"{name}.toml", name
