"""What a measurement was made on: machine, system, versions, commit. Nothing that says whose machine it is."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import edgekv
from edgekv.host import machine_name, ram_bytes, usable_cores
from edgekv.runtime.generate import Generator

#: Seconds that git may take to say which commit this is.
_GIT_S = 10


@dataclass(frozen=True)
class Environment:
    """``commit``: of edgekv, where it runs from a checkout; ``-dirty`` behind it where files were changed since."""

    processor: str
    cores: int
    ram_bytes: int
    system: str
    edgekv_version: str
    commit: str | None
    kernels: str
    engine: str
    python_version: str


def environment(generator: Generator) -> Environment:
    """Return what a generator runs on."""
    return Environment(
        processor=machine_name(),
        cores=usable_cores(),
        ram_bytes=ram_bytes(),
        system=_system(),
        edgekv_version=edgekv.__version__,
        commit=commit(Path(edgekv.__file__).resolve().parents[1]),
        kernels=generator.kernels.isa(),
        engine=generator.engine,
        python_version=platform.python_version(),
    )


def _system() -> str:
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    with contextlib.suppress(OSError):
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    return kernel


def commit(root: Path) -> str | None:
    """Return the commit of a checkout, or None: the folder is none itself, or git is not there."""
    if not (root / ".git").exists():  # an environment inside of another project's checkout
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
            capture_output=True, text=True, check=True, timeout=_GIT_S, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        ).stdout.strip()  # fmt: skip
    return None
