"""The JSON Schema of the manifest says what edgekv says, and so does the table in docs/contract.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings

from edgekv.bundle import Manifest
from edgekv.errors import FormatError
from edgekv.schema import checked, plain_json
from tests.export.manifest_page import PAGE, SCHEMA, render, schema_text
from tests.mutation import faulty_json

WHOLE: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data" / "bundle-1" / "manifest.json").read_text(encoding="utf-8")
)
SCHEMA_OF_MANIFEST: dict[str, Any] = json.loads(schema_text())
KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def allows(schema: dict[str, Any], value: Any) -> bool:
    """Tell whether a value keeps a schema, by the words that schemas of msgspec have."""
    if "$ref" in schema:
        return allows(SCHEMA_OF_MANIFEST["$defs"][schema["$ref"].rpartition("/")[2]], value)
    if "anyOf" in schema and not any(allows(part, value) for part in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    kind = schema.get("type")
    if kind is not None and (not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        return set(schema.get("required", [])) <= set(value) and all(
            allows(known[name], part)
            if name in known
            else others is True or (isinstance(others, dict) and allows(others, part))
            for name, part in value.items()
        )
    if isinstance(value, list):
        return all(allows(schema["items"], part) for part in value)
    return not isinstance(value, (int, float)) or (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and not value <= schema.get("exclusiveMinimum", float("-inf"))
    )


def test_the_schema_allows_a_manifest_and_refuses_what_edgekv_refuses() -> None:
    assert allows(SCHEMA_OF_MANIFEST, WHOLE)
    assert allows(SCHEMA_OF_MANIFEST, {**WHOLE, "special_tokens": {"bos_token": "<s>"}, "prompt_begin": [1]})
    for wrong in ({"engine": "tflite"}, {"page_sizes": 16}, {"page_size": 0}, {"graphs": "model.onnx"}):
        assert not allows(SCHEMA_OF_MANIFEST, {**WHOLE, **wrong})

    def check(document: bytes) -> None:
        try:
            data = plain_json(document)
        except FormatError:
            return
        try:
            manifest = checked(data, Manifest)
        except FormatError:
            assert not allows(SCHEMA_OF_MANIFEST, data)
            return
        words = (manifest.engine, manifest.form, manifest.weights) == ("onnx", "split", "int8")
        embedding = manifest.embedding is None or manifest.embedding.dtype == "int8"
        if words and embedding and manifest.operators is None:
            assert allows(SCHEMA_OF_MANIFEST, data)

    unbothered = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    unbothered(given(faulty_json(WHOLE))(check))()


def test_the_schema_in_the_package_and_the_table_in_docs_are_current() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), "run: python -m tests.export.manifest_page"
    page = PAGE.read_text(encoding="utf-8")
    assert page == render(page), "run: python -m tests.export.manifest_page"
