"""The row of this machine in the table that chooses the default engine of an export."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from edgekv.export.choose_engine import machine_class

from .contestants import OURS, OURS_EXECUTORCH, OURS_XNNPACK
from .results import Results

TABLE = Path(__file__).resolve().parents[2] / "export" / "engines.json"
CONTEXT = 2048


def engine_row(results: Results) -> dict[str, Any] | None:
    """Return the row, None if one of the engines was not measured."""
    onnx = results.get(OURS, CONTEXT, "decode_tok_s")
    executorch = {
        operators: speed
        for operators, name in (("edgekv", OURS_EXECUTORCH), ("xnnpack", OURS_XNNPACK))
        if (speed := results.get(name, CONTEXT, "decode_tok_s")) is not None
    }
    if onnx is None or not executorch:
        return None
    operators = max(executorch, key=lambda name: executorch[name])
    return {
        "machine": machine_class(),
        "weights": "int4",
        "onnx": onnx,
        "executorch": executorch[operators],
        "operators": operators,
        "on": f"{_cpu()}, {os.cpu_count()} cores",
    }


def record(row: dict[str, Any]) -> None:
    """Put a row into the table, in the place of one of the same machine class and weights."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    rows = [other for other in rows if (other["machine"], other["weights"]) != (row["machine"], row["weights"])]
    TABLE.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor())
