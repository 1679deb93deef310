"""The row of this machine in the table that chooses the default engine of an export."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from edgekv.export.choose_engine import Measurement, measurements
from edgekv.host import machine_class, machine_name

from .contestants import OURS, OURS_EXECUTORCH, OURS_XNNPACK
from .results import Results

TABLE = Path(__file__).resolve().parents[2] / "export" / "engines.json"
CONTEXT = 2048


def engine_row(results: Results) -> Measurement | None:
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
    return Measurement(
        machine_class(),
        "int4",
        onnx,
        executorch[operators],
        operators,
        f"{machine_name()}, {os.cpu_count()} cores",
    )


def record(row: Measurement) -> None:
    """Put a row into the table, in the place of one of the same machine class and weights."""
    others = [other for other in measurements() if (other.machine, other.weights) != (row.machine, row.weights)]
    rows = [asdict(one) for one in [*others, row]]
    TABLE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
