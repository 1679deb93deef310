"""What cannot work on a device is said before anything is copied to it."""

from __future__ import annotations

import math

from edgekv.bundle import Manifest
from edgekv.device_profiles.budget import KVBudget
from edgekv.errors import BudgetError, UsageError
from edgekv.sizes import format_bytes
from edgekv.spec import RUNTIME_OVERHEAD_BYTES

from .facts import DeviceFacts

#: As ``requires-python`` of pyproject.toml, which a test holds against it.
LEAST_PYTHON = (3, 10)
#: Architectures for which edgekv and all that it needs have wheels.
ARCHITECTURES = ("x86_64", "aarch64")
#: The oldest glibc of those wheels.
LEAST_GLIBC = (2, 27)
#: Of the memory that is available now, what other programs may come to need.
HEADROOM_SHARE = 0.1
#: What stays free beside what is copied: folders, profiles, notes.
SPARE_FLASH_BYTES = 32 << 20


def check_runtime(name: str, facts: DeviceFacts, manifest: Manifest) -> None:
    """Check that the device can run edgekv at all.

    Raises:
        UsageError: it cannot; the message says what it lacks.
    """
    if facts.system != "Linux":
        raise UsageError(f"{name} runs {facts.system}; there are wheels for Linux only: install edgekv there by hand")
    if facts.machine not in ARCHITECTURES:
        raise UsageError(f"{name} is {facts.machine}; there are wheels for {' and '.join(ARCHITECTURES)} only")
    python = facts.python
    least = ".".join(map(str, LEAST_PYTHON))
    if python is None:
        raise UsageError(f"{name} has no python3; install Python {least} or newer there (apt install python3)")
    if python.version < LEAST_PYTHON or python.implementation != "cpython":
        raise UsageError(f"{name} has {python.implementation} {python}; edgekv needs CPython {least} or newer")
    if python.bits != 64:
        raise UsageError(
            f"{name} has a Python of {python.bits} bits on {facts.machine}; there are wheels for 64 bits only: install a"
            " 64-bit system"
        )
    if facts.glibc is None:
        raise UsageError(
            f"{name} has the C library {facts.libc}; there are wheels for glibc only: Debian, Ubuntu, Fedora..."
        )
    if facts.glibc < LEAST_GLIBC:
        least = ".".join(map(str, LEAST_GLIBC))
        raise UsageError(f"{name} has {facts.libc}; the wheels need {least} or newer: upgrade its system")
    if manifest.engine == "executorch" and manifest.form == "split" and not facts.compiler:
        raise UsageError(
            f"{name} has no C++ compiler, which compiles the engine of this bundle when it first runs; install g++ there,"
            " or export the bundle with --engine onnx"
        )


def check_made_for(name: str, facts: DeviceFacts, manifest: Manifest) -> str | None:
    """Check that a bundle's products were not chosen for another architecture: only those of 4 bits are theirs alone.

    Returns:
        What to say of a bundle for another processor of this architecture, or None.

    Raises:
        UsageError: they were, and it would crawl there.
    """
    made_for, here = manifest.made_for, facts.machine_class
    if made_for in (None, here) or manifest.weights != "int4" or manifest.form != "split":
        return None
    assert made_for is not None
    said = f"the bundle was made for {made_for} ({manifest.engine}), and {name} is {here}"
    if made_for.split(",")[0] != here.split(",")[0]:
        raise UsageError(f"{said}: export it with --target PROFILE of this device")
    return f"{said}: it may be slow; export it with --target PROFILE of this device"


def check_memory(name: str, facts: DeviceFacts, manifest: Manifest) -> KVBudget:
    """Return what the device has now for keys and values beside the weights.

    Raises:
        BudgetError: nothing.
    """
    headroom = math.ceil(HEADROOM_SHARE * facts.available_bytes)
    budget = KVBudget(name, facts.available_bytes, manifest.weights_bytes(), RUNTIME_OVERHEAD_BYTES, headroom)
    if budget.kv_bytes <= 0:
        raise BudgetError(
            f"{name} has too little memory for this bundle: of {format_bytes(facts.ram_bytes)} are"
            f" {format_bytes(facts.available_bytes)} available; - weights {format_bytes(budget.weights_bytes)}"
            f" - runtime {format_bytes(RUNTIME_OVERHEAD_BYTES)} - headroom {format_bytes(headroom)} ="
            f" {format_bytes(budget.kv_bytes)}; use smaller weights (--weights int4), a smaller model, or end other programs"
        )
    return budget


def check_flash(name: str, facts: DeviceFacts, needed_bytes: int) -> None:
    """Check that what is to be copied, and unpacked, fits on the device's flash.

    Raises:
        UsageError: it does not.
    """
    needed_bytes += SPARE_FLASH_BYTES
    if needed_bytes > facts.free_flash_bytes:
        raise UsageError(
            f"{name} has {format_bytes(facts.free_flash_bytes)} free at {facts.folder}, and {format_bytes(needed_bytes)} are"
            " needed; make room there, or name another drive with --to"
        )
