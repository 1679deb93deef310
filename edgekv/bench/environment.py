"""What a measurement was made on: machine, system, versions, commit. Nothing that says whose machine it is."""

from __future__ import annotations

import contextlib
import platform
from dataclasses import dataclass

import edgekv
from edgekv.host import machine_name, ram_bytes, usable_cores
from edgekv.runtime.build import build_commit
from edgekv.runtime.generate import Generator


@dataclass(frozen=True)
class Environment:
    """``commit``: of edgekv, where it is known; ``-dirty`` behind it where files were changed since."""

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
        commit=build_commit(),
        kernels=generator.kernels.isa(),
        engine=generator.engine,
        python_version=platform.python_version(),
    )


def _system() -> str:
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    with contextlib.suppress(OSError):
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    return kernel
