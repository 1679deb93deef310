"""Wheels for the Python of a device, fetched here, so that the device needs neither pip nor a network."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import edgekv
from edgekv.bundle import file_sha256
from edgekv.errors import EdgeKVError, EngineMissing, UsageError
from edgekv.files import is_own_folder, make_own_folder
from edgekv.runtime.system.process import cache_home
from edgekv.scratch import ScratchFolder

from .facts import DeviceFacts, Python

#: What packages need on an older Python than this one only: pip looks at the Python that it runs in for that.
_BACKPORTS = {(3, 10): ("tomli", "exceptiongroup", "typing-extensions")}
#: Of the ExecuTorch package only the libraries are used; what it depends on is for exporting.
EXECUTORCH = "executorch==1.5.1"
#: The oldest glibc that any tag names, for an architecture.
_FIRST_GLIBC = {"x86_64": 5, "aarch64": 17}


@dataclass(frozen=True)
class Wanted:
    """Which wheels: for which device, with which engine, and ``own``: a wheel of edgekv, a folder with some, or None."""

    facts: DeviceFacts
    engine: str
    serve: bool
    own: Path | None


def fetch_wheels(wanted: Wanted) -> list[Path]:
    """Return wheels of edgekv and of all that it needs on a device, fetched or from the cache folder.

    Raises:
        UsageError: there is none of edgekv for this device.
        EdgeKVError: pip cannot fetch one; the message has its words.
        EngineMissing: there is no pip here.
    """
    if importlib.util.find_spec("pip") is None:
        raise EngineMissing("`edgekv deploy` fetches wheels with pip, which is missing: python -m ensurepip")
    home = cache_home() / "deploy"
    make_own_folder(home)
    own = _own_wheel(wanted, home)
    folder = home / _key(wanted, own)
    if not is_own_folder(folder):
        extra = "[serve]" if wanted.serve else ""
        asked = f"edgekv{extra} @ {own.resolve().as_uri()}" if own else f"edgekv{extra}=={edgekv.__version__}"
        with ScratchFolder(home, "fetch-") as scratch:
            made = scratch.path / "wheels"
            made.mkdir(mode=0o700)
            _pip(wanted.facts, made, asked, *_BACKPORTS.get(_python(wanted.facts).version, ()))
            if wanted.engine == "executorch":
                _pip(wanted.facts, made, "--no-deps", EXECUTORCH)
            scratch.put(made, folder)
    return sorted(folder.glob("*.whl"))


def default_own() -> Path | None:
    """Return the folder of this checkout's own wheels, if there is one."""
    dist = Path(edgekv.__file__).resolve().parents[1] / "dist"
    return dist if any(dist.glob("edgekv-*.whl")) else None


def _own_wheel(wanted: Wanted, home: Path) -> Path | None:
    """Return edgekv's own wheel for a device; None: the index has to have it."""
    own = wanted.own or default_own()
    if own is None or own.is_file():
        return own
    if not own.is_dir():
        raise UsageError(f"there is no {own}; --wheel names a wheel of edgekv or a folder with some (make wheels)")
    with ScratchFolder(home, "own-") as scratch:
        asked = f"edgekv=={edgekv.__version__}"
        try:
            _pip(wanted.facts, scratch.path, "--no-deps", "--no-index", "--find-links", str(own), asked)
        except EdgeKVError as error:
            raise UsageError(
                f"{own} has no wheel of edgekv {edgekv.__version__} for {wanted.facts.machine}, Python"
                f" {wanted.facts.python} and {wanted.facts.libc}; make one with: make wheels"
            ) from error
        return own / next(scratch.path.glob("edgekv-*.whl")).name


def _key(wanted: Wanted, own: Path | None) -> str:
    """Name what determines a set of wheels."""
    facts = wanted.facts
    parts = [
        facts.machine, facts.libc, str(facts.python), _python(facts).abi_flags, wanted.engine, wanted.serve,
        file_sha256(own) if own else edgekv.__version__,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _python(facts: DeviceFacts) -> Python:
    assert facts.python is not None
    return facts.python


def platforms(facts: DeviceFacts) -> list[str]:
    """Return the tags of wheels that run on a device, the newest first, as PEP 600 has them."""
    assert facts.glibc is not None
    major, minor = facts.glibc
    tags = [f"manylinux_{major}_{number}" for number in range(minor, _FIRST_GLIBC[facts.machine] - 1, -1)]
    tags += ["manylinux2014", *(["manylinux2010", "manylinux1"] if facts.machine == "x86_64" else []), "linux"]
    return [f"{tag}_{facts.machine}" for tag in tags]


def _pip(facts: DeviceFacts, folder: Path, *asked: str) -> None:
    python = _python(facts)
    digits = "{}{}".format(*python.version)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--disable-pip-version-check",
        "--no-input",
        "-d",
        str(folder),
    ]
    command += ["--only-binary=:all:", "--python-version", str(python), "--implementation", "cp"]
    command += [part for tag in platforms(facts) for part in ("--platform", tag)]
    command += [part for abi in (f"cp{digits}{python.abi_flags}", "abi3", "none") for part in ("--abi", abi)]
    done = subprocess.run([*command, *asked], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise EdgeKVError(
            f"pip cannot fetch {asked[-1]} for {facts.machine}, Python {python} and {facts.libc}:"
            f" {' '.join(' '.join(lines).split())[:600]}; --wheel names a wheel of edgekv (make wheels)"
        )
