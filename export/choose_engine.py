"""Which engine a bundle is exported for when nobody says: the one that was measured fastest on machines of this class.

``engines.json`` beside this file holds the measurements, one row per machine class and weight type: decoding at 2048
tokens, split form, INT8 pages. `make bench` prints the row of the machine that it runs on, and writes it with --record
(docs/executorch.md shows the table). What was not measured for both engines gets ONNX Runtime, which runs everywhere.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import resources

from edgekv.contract import OPERATORS, WEIGHTS
from edgekv.host import machine_class
from edgekv.schema import PositiveFinite, checked, one_of, plain_json

MEASUREMENTS = "engines.json"
#: What exporting for ExecuTorch imports.
_EXECUTORCH = ("executorch", "torchao")
NOT_INSTALLED = 'not installed: pip install "edgekv[export,executorch]"'


@dataclass(frozen=True)
class Measurement:
    """One row of the table: tokens/s of both engines, what ExecuTorch computed with, and on what machine that was."""

    machine: str
    weights: str
    onnx: PositiveFinite
    executorch: PositiveFinite
    operators: str
    on: str

    def __post_init__(self) -> None:
        one_of(self.weights, "weights", WEIGHTS)
        one_of(self.operators, "operators", OPERATORS)


@dataclass(frozen=True)
class EngineChoice:
    """An engine, what it computes with (None: nothing to choose), and one line that says why it was taken."""

    engine: str
    reason: str
    operators: str | None = None


def measurements() -> list[Measurement]:
    """Return the rows of the table.

    Raises:
        FormatError: it is damaged.
    """
    return parse_measurements((resources.files("edgekv.export") / MEASUREMENTS).read_bytes())


def parse_measurements(data: bytes) -> list[Measurement]:
    """Read the JSON of the table; see :func:`measurements`."""
    return checked(plain_json(data), list[Measurement], "measurement")


def measured(machine: str, weights: str) -> Measurement | None:
    """Return the row of a machine class and a weight type, if there is one."""
    return next((row for row in measurements() if (row.machine, row.weights) == (machine, weights)), None)


def has_kernels(machine: str) -> bool:
    """Whether our own 4-bit products have kernels for a machine class; AMX comes with AVX-512 VNNI."""
    return _has_vnni(machine) or machine.startswith("arm64")


def beats_xnnpack(machine: str) -> bool:
    """Whether our own 4-bit products were measured to be faster than XNNPACK's on a machine class; on Arm nobody did."""
    return _has_vnni(machine)


def _has_vnni(machine: str) -> bool:
    return "AVX-512 VNNI" in machine


def default_engine(form: str, weights: str, machine: str | None = None) -> EngineChoice:
    """Choose the engine of an export.

    Args:
        machine: a class as :func:`edgekv.host.machine_class` names it; None is this machine.
    """
    machine = machine or machine_class()
    if form == "inline":
        return EngineChoice("onnx", "the inline form is for any ONNX Runtime")
    row = measured(machine, weights)
    if row is None:
        return EngineChoice("onnx", f"runs everywhere; nothing faster was measured on {machine} with {weights} weights")
    speeds = {"onnx": row.onnx, "executorch": row.executorch}
    fastest = max(speeds, key=lambda engine: speeds[engine])
    slower = min(speeds, key=lambda engine: speeds[engine])
    speed = f"{speeds[fastest]:.0f} tokens/s against {speeds[slower]:.0f} of {slower} on {machine}, {weights}"
    if fastest == "executorch" and not executorch_installed():
        return EngineChoice("onnx", f"executorch is faster ({speed}) but {NOT_INSTALLED}")
    operators = row.operators if fastest == "executorch" else None
    return EngineChoice(fastest, f"measured fastest: {speed}", operators)


def slow_on(engine: str, form: str, weights: str, operators: str | None, machine: str | None = None) -> str | None:
    """Say on which machines a bundle is slower than another export would be, and which; None where nothing is known to be.

    Args:
        machine: the class of the only machine that matters; None: any may.

    Our own 4-bit products have kernels for AVX-512 VNNI, AMX and Arm; elsewhere the operators run portable code, and in ONNX
    Runtime the engine's own products take their place (docs/executorch.md has the measurements).
    """
    if weights != "int4" or form != "split":
        return None
    if engine == "executorch" and operators != "edgekv":
        faster = machine is None or beats_xnnpack(machine)
        return "with AVX-512 VNNI an export with --operators edgekv is faster" if faster else None
    if machine is not None and has_kernels(machine):
        return None
    if engine == "executorch":
        return "slow on x86-64 without AVX-512 VNNI: for that export with --operators xnnpack"
    return (
        "on x86-64 without AVX-512 VNNI a prompt is read several times slower than with it: compare with"
        " --engine executorch --operators xnnpack there"
    )


def executorch_installed() -> bool:
    """Whether exporting for ExecuTorch is possible here."""
    return all(importlib.util.find_spec(name) for name in _EXECUTORCH)
