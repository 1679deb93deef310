"""``edgekv profiles calibrate``: measure this machine and write what was found as a profile."""

from __future__ import annotations

import datetime
import platform
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edgekv import settings
from edgekv.bundle import read_manifest
from edgekv.device_profiles import load, user_dir
from edgekv.device_profiles.schema import KINDS, NAME
from edgekv.errors import UsageError

from .files import check_writable, write_text
from .options import option
from .output import print_json, stderr
from .profile_table import print_profile

EPILOG = """
Examples:

`edgekv profiles calibrate` writes ~/.config/edgekv/profiles/HOSTNAME.toml

`edgekv profiles calibrate --bundle llama.edgekv --out my-board.toml` also measures the engine

`edgekv profiles calibrate --dir /mnt/nvme --name my-nvme`
"""


def calibrate_command(
    out: Annotated[Path | None, option(settings.FILE, "--out", metavar="FILE", help="The profile to write. Default: among your profiles, under the host's name.")] = None,
    name: Annotated[str | None, option(settings.WORD, "--name", help="The profile's name. Default: the file's, or the host's.")] = None,
    bundle: Annotated[Path | None, option(settings.BUNDLE, "--bundle", help="Also measure the engine with this bundle.")] = None,
    folder: Annotated[Path | None, option(settings.FILE, "--dir", metavar="DIR", help="A folder on the drive to measure. Default: where `edgekv run` offloads to.")] = None,
    threads: Annotated[int | None, option(settings.THREADS, "--threads", help="Default: as for `edgekv run`.")] = None,
    kind: Annotated[str, option(settings.WORD, "--kind", help=", ".join(KINDS))] = "laptop",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a profile.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON instead of a table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not print the profile.")] = False,
) -> None:  # fmt: skip
    """Measure this machine in under a minute (memory, matrices, attention, drive) and write a profile."""
    from edgekv.calibrate import calibrate, profile_toml
    from edgekv.runtime.system.process import cache_home, default_threads

    if kind not in KINDS:
        raise UsageError(f"unknown kind {kind!r}; use one of {', '.join(KINDS)}")
    path, name = _target(out, name)
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is not the name of a profile; use lower-case letters, digits and hyphens")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; choose another with --out or --name, or overwrite it with --force")
    if bundle is not None:
        read_manifest(bundle)
    _make_folder(path)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        found = calibrate(folder or cache_home() / "offload", threads or default_threads(), bundle, progress)
    title = f"{platform.node() or 'this machine'}: {platform.machine()}, {found.threads} threads, {found.isa}"
    text = profile_toml(found, name=name, title=title, kind=kind, date=datetime.date.today().isoformat())
    write_text(path, text, "--out")
    load(path)
    if as_json:
        print_json(load(path).to_json())
    elif not quiet:
        print_profile(load(path))
    console.print(f"wrote {path}; use it with --profile {path if out else name}", highlight=False, soft_wrap=True)


def _make_folder(path: Path) -> None:
    """Say now, not after the measurements, that the profile cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; choose another with --out") from error
    check_writable(path, "--out")


def _target(out: Path | None, name: str | None) -> tuple[Path, str]:
    """Return the file and the profile's name, which is the file's."""
    if out is not None:
        if out.suffix != ".toml" or (name is not None and name != out.stem):
            raise UsageError(f"--out {out} must be named {name or 'NAME'}.toml: a profile has its file's name")
        return out, out.stem
    name = name or re.sub(r"[^a-z0-9]+", "-", platform.node().lower()).strip("-") or "this-machine"
    return user_dir() / f"{name}.toml", name
