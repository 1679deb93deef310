"""The measurements of one machine, in order, with progress."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edgekv.host import control_groups, machine_class, ram_bytes
from edgekv.plan.model import read_model
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.kernels.interface import KIND_HOT

from .compute import attention_rates, matrix_rates, read_bandwidth
from .drive import SIZES, Drive, check_folder, measure_drive
from .engine import EngineRates, measure_engine

#: Bits of the matrices that are measured, by the weight type that they stand for.
WEIGHT_BITS = {"int4": 4, "int8": 8, "fp32": 32}
#: Steps of :func:`measure_drive`: filling the file, three sizes and two queue depths read, three and one written.
_DRIVE_STEPS = 1 + len(SIZES) + 2 + len(SIZES) + 1


@dataclass(frozen=True)
class Calibration:
    """What was measured. ``read_bytes_per_s`` by threads; ``matrices``: (weight bytes/s of a token, ops/s of a chunk)."""

    threads: int
    isa: str
    machine: str
    ram_bytes: int
    available_bytes: int
    os_page_bytes: int
    swaps: bool
    read_bytes_per_s: dict[int, float]
    matrices: dict[str, tuple[float, float]]
    kv_read_bytes_per_s: float
    kv_fp16_read_bytes_per_s: float
    attention_ops_per_s: float
    drive: Drive
    engine: str | None = None
    weights: str | None = None
    engine_rates: EngineRates | None = field(default=None)


def calibrate(
    folder: Path,
    threads: int,
    bundle: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Calibration:
    """Measure this machine.

    Args:
        folder: on the drive that pages would go to.
        bundle: also measure the engine with this bundle.
        progress: called with what is measured next, steps done, steps in all.

    Raises:
        UsageError: no file can be made in the folder. StoreError: the drive fails. BundleError: the bundle cannot be used.
    """
    check_folder(folder)
    model = read_model(bundle) if bundle is not None else None
    counts = sorted({1, threads, *(n for n in (2, 4, 8) if n <= (os.cpu_count() or 1))})
    total = len(counts) + len(WEIGHT_BITS) + 1 + _DRIVE_STEPS + (4 if bundle is not None else 0)
    done = 0

    def advance(what: str) -> None:
        nonlocal done
        progress(what, done, total)
        done += 1

    read = {}
    for count in counts:
        advance(f"reading memory, {count} threads")
        read[count] = read_bandwidth(count)
    matrices = {}
    for weights, bits in WEIGHT_BITS.items():
        advance(f"multiplying {weights} matrices")
        matrices[weights] = matrix_rates(bits, threads)
    advance("attention")
    kv, attention = attention_rates(threads)
    kv_fp16, _ = attention_rates(threads, kind=KIND_HOT)
    drive = measure_drive(folder, lambda: advance("the drive"))
    rates = None
    if bundle is not None and model is not None:
        known = matrices.get(model.weights) if model.engine == "onnx" else None
        rates = measure_engine(
            bundle,
            threads,
            folder,
            known[0] if known else None,
            drive.read_bytes_per_s,
            lambda: advance("the engine"),
        )
    progress("done", total, total)
    ram, available, swaps = _memory()
    return Calibration(
        threads=threads,
        isa=load_kernels().isa(),
        machine=machine_class(),
        ram_bytes=ram,
        available_bytes=available,
        os_page_bytes=os.sysconf("SC_PAGE_SIZE"),
        swaps=swaps,
        read_bytes_per_s=read,
        matrices=matrices,
        kv_read_bytes_per_s=kv,
        kv_fp16_read_bytes_per_s=kv_fp16,
        attention_ops_per_s=attention,
        drive=drive,
        engine=model.engine if model else None,
        weights=model.weights if model else None,
        engine_rates=rates,
    )


def _memory() -> tuple[int, int, bool]:
    """Return RAM in bytes, what of it is available now, and whether the system swaps."""
    ram = ram_bytes()
    if platform.system() != "Linux":
        return ram, int(0.7 * ram), True
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.split()[1].isdigit()}
    available = kib["MemAvailable"] * 1024
    limits = [limit for _, limit in filter(None, (group.used_and_limit() for group in control_groups()))]
    return ram, min(available, ram, *limits), kib.get("SwapTotal", 0) > 0
