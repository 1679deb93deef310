"""What is made of the manifest's fields: edgekv/manifest.schema.json and tables of docs/contract.md.

`python -m tests.export.manifest_page` writes both.
"""

from __future__ import annotations

import json
from pathlib import Path

from edgekv.bundle import Manifest
from edgekv.contract import EXECUTORCH_HEAD_ROWS, EXECUTORCH_PREFILL_ROWS, EXECUTORCH_ROWS
from tests.fields import field_table, json_schema, put_tables

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "edgekv" / "manifest.schema.json"
PAGE = ROOT / "docs" / "contract.md"


def schema_text() -> str:
    return json.dumps(json_schema(Manifest), indent=1) + "\n"


def limits() -> str:
    rows = EXECUTORCH_PREFILL_ROWS
    methods, heads = (", ".join(map(str, sizes)) for sizes in (EXECUTORCH_ROWS, EXECUTORCH_HEAD_ROWS))
    table = (
        ("onnx", "inline", "T >= 1", "any"),
        ("onnx", "split", "T >= 1", ""),
        (
            "executorch",
            "inline",
            f"method `decode`: T = 1, L = 1; `prefill`: T = 1 to {rows}, L <= {rows}",
            "N * page_size and R <= `model.max_context`, rounded up to whole pages",
        ),
        (
            "executorch",
            "split",
            f"methods `segment_{{l}}_t{{T}}` with T = {methods}; the last segment T = {heads}: a step is put together of them",
            "",
        ),
    )
    head = ["| engine | form | new tokens of a call | pages and recent tokens |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in table)])


def render(page: str) -> str:
    return put_tables(page, {"manifest": field_table(Manifest), "limits": limits()})


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
