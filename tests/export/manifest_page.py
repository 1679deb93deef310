"""What is made of the manifest's fields: edgekv/manifest.schema.json and a table of docs/contract.md.

`python -m tests.export.manifest_page` writes both.
"""

from __future__ import annotations

import json
from pathlib import Path

from edgekv.bundle import Manifest
from tests.fields import field_table, json_schema, put_tables

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "edgekv" / "manifest.schema.json"
PAGE = ROOT / "docs" / "contract.md"


def schema_text() -> str:
    return json.dumps(json_schema(Manifest), indent=1) + "\n"


def render(page: str) -> str:
    return put_tables(page, {"manifest": field_table(Manifest)})


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
