"""The steps of `edgekv deploy`, in their order: ask, refuse, fetch, copy, check, calibrate, serve."""

from __future__ import annotations

import json
import posixpath
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgekv.bundle import Manifest, check_files, read_manifest
from edgekv.device_profiles import load, user_dir
from edgekv.errors import EdgeKVError, TokensDiffer, UsageError
from edgekv.runtime.options import verified_stamp
from edgekv.scratch import ScratchFolder
from edgekv.settings import Choice, Words

from .copy import Item, Plan, Progress, bundle_items, copy, plan_copy, unpacked_bytes, wheel_items
from .device import Device, Finished
from .facts import DeviceFacts, ask_device
from .refuse import check_flash, check_made_for, check_memory, check_runtime
from .service import unit_name, unit_text
from .target import Target
from .wheels import Wanted, fetch_wheels

CHECK = Choice("check", ("greedy", "none"))
CALIBRATE = Choice("calibrate", ("quick", "full", "none"))
FOLDER = Words("to", line=True)
#: The folder of what was unpacked, and the command, both in the folder of all that is deployed.
PACKAGES, LAUNCHER = "packages", "edgekv"


@dataclass(frozen=True)
class DeployOptions:
    """How to deploy; ``folder``: on the device, below the user's home there unless it begins with a slash.

    ``own``: a wheel of edgekv, or a folder with some. ``serve``: options of the service, None for none. ``again``: calibrate
    also where there is a profile.
    """

    folder: str = "edgekv"
    own: Path | None = None
    check: str = "greedy"
    calibrate: str = "quick"
    again: bool = False
    serve: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Survey:
    """What was found before anything changed. ``notes``: what a person should know."""

    facts: DeviceFacts
    manifest: Manifest
    items: tuple[Item, ...]
    plan: Plan
    kv_bytes: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "device": self.facts.to_json(), "kv_bytes_left": self.kv_bytes, "bundle_bytes_to_copy": self.plan.left,
            "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True)
class Deployed:
    """What stands on the device now. ``tokens``: what both machines gave; ``command``: typed here, it talks to the model."""

    survey: Survey
    bundle: str
    sent_bytes: int
    tokens: tuple[int, ...] | None
    profile: Path | None
    service: str | None
    command: str

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            **self.survey.to_json(), "bundle": self.bundle, "sent_bytes": self.sent_bytes,
            "tokens": list(self.tokens) if self.tokens is not None else None,
            "profile": str(self.profile) if self.profile else None, "service": self.service, "command": self.command,
        }  # fmt: skip


def survey(device: Device, bundle: Path, options: DeployOptions) -> Survey:
    """Ask a device what it is and what it has, and refuse what cannot work; nothing is changed there.

    Raises:
        UsageError: it cannot work; the message says what is lacking.
        DeviceLost: the device does not answer.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, stamp=verified_stamp(bundle))
    facts = ask_device(device, options.folder)
    check_runtime(device.name, facts, manifest)
    note = check_made_for(device.name, facts, manifest)
    budget = check_memory(device.name, facts, manifest)
    if options.serve is not None and not facts.services:
        raise UsageError(
            f"{device.name} has no systemd for services of the user (systemctl --user); leave --service away and start"
            " `edgekv serve` there by its own means"
        )
    name = bundle.resolve().name
    if name in (PACKAGES, LAUNCHER):
        raise UsageError(f"a bundle cannot be called {name} on a device; rename {bundle}, such as {name}.edgekv")
    items = bundle_items(bundle, manifest)
    plan = plan_copy(device, items, f"{facts.folder}/.{name}.part", f"{facts.folder}/{name}")
    check_flash(device.name, facts, plan.left)
    return Survey(facts, manifest, tuple(items), plan, budget.kv_bytes, (note,) if note else ())


def deploy(
    device: Device, target: Target, bundle: Path, options: DeployOptions, progress: Progress, say: Callable[[str], None]
) -> Deployed:
    """Put a bundle and what runs it onto a device, and try it there.

    Args:
        say: told of each step in a few words.

    Raises:
        TokensDiffer: the device gives other tokens. All is in place.
        UsageError: it cannot work; nothing is changed there.
        EdgeKVError: a step failed there.
        DeviceLost: the connection ended; the same call goes on.
    """
    say("asking the device")
    found = survey(device, bundle, options)
    facts, name = found.facts, bundle.resolve().name
    where = f"{facts.folder}/{name}"
    say("fetching wheels")
    wheels = fetch_wheels(Wanted(facts, found.manifest.engine, options.serve is not None, options.own))
    parts = wheel_items(wheels, f"{facts.folder}/{PACKAGES}")
    wheel_plan = plan_copy(device, parts, f"{facts.folder}/{PACKAGES}")
    unpacked = sum(unpacked_bytes(one.item.source) for one in wheel_plan.missing)
    check_flash(device.name, facts, found.plan.left + wheel_plan.left + unpacked)

    say("copying wheels")
    sent = copy(device, wheel_plan, progress)
    device.ask("unpack", wheels=[[f"{facts.folder}/{PACKAGES}/{item.name}", item.instead] for item in parts])
    packages = _install(device, facts, [item.instead for item in parts if item.instead])
    say("copying the bundle")
    if any(there[1] != where for there in found.plan.there) or found.plan.missing:
        sent += copy(device, found.plan, progress)
        device.ask("place", folder=found.plan.folder, target=where, names=[item.name for item in found.items])

    there = Runtime(device, packages)
    tokens = None
    if options.check == "greedy":
        say("comparing tokens")
        tokens = compare_tokens(there, bundle, where)
    profile = None
    if options.calibrate != "none":
        say("calibrating")
        profile = _calibrate(there, facts, where if options.calibrate == "full" else None, options.again)
    more = ["--profile", f"{facts.folder}/{profile.name}"] if profile else []
    service = None
    if options.serve is not None:
        say("starting the service")
        service = _serve(device, facts, name, [*more, *options.serve])
    ask = ["--chat"] if found.manifest.chat_template else ["--prompt", "Once upon a time"]
    words = [f"{facts.folder}/{LAUNCHER}", "run", where, *more, *ask]
    return Deployed(
        found, where, sent, tuple(tokens) if tokens is not None else None, profile, service, command_line(target, words)
    )


def command_line(target: Target, words: Sequence[str]) -> str:
    """Return the line that runs a command on the device from here."""
    if target.transport == "adb":
        client = ["adb", *(["-s", target.address] if target.address else []), "shell", "-t"]
    else:
        port = ["-p", str(target.port)] if target.port is not None else []
        client = ["ssh", "-t", *port, target.host]
    return shlex.join([*client, shlex.join(words)])


@dataclass(frozen=True)
class Runtime:
    """edgekv on a device."""

    device: Device
    packages: Sequence[str]

    def run(self, *words: str, stdin: bytes = b"") -> Finished:
        """Run Python there with these words; ``-`` is a program on stdin.

        Raises:
            EdgeKVError: it failed; the message has its last line.
        """
        done = self.device.run(
            f"env PYTHONPATH={shlex.quote(':'.join(self.packages))} python3 {shlex.join(words)}", stdin
        )
        if done.code != 0:
            last = (done.stderr.strip() or f"exit code {done.code}").splitlines()[-1].removeprefix("edgekv: ")
            raise EdgeKVError(f"{self.device.name}: edgekv fails there: {last}")
        return done


def _install(device: Device, facts: DeviceFacts, folders: Sequence[str]) -> list[str]:
    """Write the command `edgekv` there, which finds what is unpacked, and return the folders of the packages.

    What an earlier deployment brought beside them stays: another bundle's engine, the packages of a service.
    """
    launcher = f"{facts.folder}/{LAUNCHER}"
    before = re.search(r"^PYTHONPATH='?([^'\n]*)'?", device.run(f"cat {shlex.quote(launcher)}").stdout.decode(), re.M)
    new = {_distribution(folder) for folder in folders}
    kept = [one for one in (before[1].split(":") if before else []) if one and _distribution(one) not in new]
    packages = [*folders, *kept]
    assert facts.python is not None
    text = "#!/bin/sh\n# Made by `edgekv deploy`, and made anew each time.\n"
    text += f"PYTHONPATH={shlex.quote(':'.join(packages))}\nexport PYTHONPATH\n"
    text += f'exec {shlex.quote(facts.python.path)} -m edgekv "$@"\n'
    device.ask("write", path=launcher, text=text, mode=0o755)
    return packages


def _distribution(folder: str) -> str:
    return posixpath.basename(folder).split("-")[0]


def compare_tokens(there: Runtime, bundle: Path, where: str) -> list[int]:
    """Return the tokens for a short prompt, which are the same here and there.

    Raises:
        TokensDiffer: they are not; the message names the first that differs.
        EdgeKVError: the bundle does not run here, or not there.
    """
    here = subprocess.run(
        [sys.executable, "-m", f"{__package__}.tokens", str(bundle)], capture_output=True, text=True, check=False
    )
    if here.returncode != 0:
        last = (here.stderr.strip() or f"exit code {here.returncode}").splitlines()[-1]
        raise EdgeKVError(
            f"{bundle} does not run on this machine, so nothing can be compared: {last}; --check none skips it"
        )
    wanted: list[int] = json.loads(here.stdout)
    program = files(__package__).joinpath("tokens.py").read_bytes()  # an edgekv there may be an older one
    got: list[int] = json.loads(there.run("-", where, stdin=program).stdout)
    if got != wanted:
        at = next(
            (at for at, (one, two) in enumerate(zip(got, wanted, strict=False)) if one != two),
            min(len(got), len(wanted)),
        )
        raise TokensDiffer(
            f"{there.device.name} gives other tokens: token {at} is {(*got[at:], None)[0]} there and {(*wanted[at:], None)[0]}"
            f" here; all is in place, and int4 products may differ between kinds of processors: `edgekv verify` tells what"
            " that costs, --check none accepts it"
        )
    return wanted


def profile_name(facts: DeviceFacts) -> str:
    """Name the profile of a device, after its host name."""
    return re.sub(r"[^a-z0-9]+", "-", facts.node.lower()).strip("-") or "device"


def _calibrate(there: Runtime, facts: DeviceFacts, bundle: str | None, again: bool) -> Path:
    """Measure the device and bring its profile to those of this user; one that is there is sent instead."""
    name = profile_name(facts)
    path, remote = user_dir() / f"{name}.toml", f"{facts.folder}/{name}.toml"
    if path.exists() and not again:
        there.device.ask("write", path=remote, text=path.read_text(encoding="utf-8"), mode=0o644)
        return path
    engine = ["--bundle", bundle] if bundle else []
    there.run(
        "-m",
        "edgekv",
        "profiles",
        "calibrate",
        "--out",
        remote,
        "--dir",
        f"{facts.folder}/.calibrate",
        "--force",
        "--quiet",
        "--kind",
        "board" if facts.machine == "aarch64" else "laptop",
        *engine,
    )
    there.device.run(f"rmdir {shlex.quote(facts.folder + '/.calibrate')}")
    text = there.device.run(f"cat {shlex.quote(remote)}").stdout
    path.parent.mkdir(parents=True, exist_ok=True)
    with ScratchFolder(path.parent, "deploy-") as scratch:
        made = scratch.path / path.name
        made.write_bytes(text)
        load(made)  # what a device says is not believed before
        made.replace(path)
    return path


def _serve(device: Device, facts: DeviceFacts, name: str, words: Sequence[str]) -> str:
    """Install and start the unit, and return its name."""
    unit = unit_name(name)
    command = [f"{facts.folder}/{LAUNCHER}", "serve", f"{facts.folder}/{name}", *words]
    home = device.run("cd && pwd").stdout.decode().strip()
    device.ask("write", path=f"{home}/.config/systemd/user/{unit}", text=unit_text(name, command), mode=0o644)
    steps = ("daemon-reload", f"enable {shlex.quote(unit)}", f"restart {shlex.quote(unit)}")
    done = device.run(" && ".join(f"systemctl --user {step}" for step in steps))
    if done.code != 0:
        raise EdgeKVError(
            f"{device.name}: systemd does not start {unit}: {done.said}; journalctl --user -u {unit} says more there"
        )
    device.run(
        "loginctl enable-linger"
    )  # without it the service ends with the user's last session; some systems ask an admin
    return unit
