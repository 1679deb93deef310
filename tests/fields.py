"""Documents made of the types of a file format: its JSON Schema, and a table of its fields."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec


def json_schema(kind: type) -> dict[str, Any]:
    """Return the JSON Schema of a dataclass: every number in its range, and no field that the format does not have."""
    schema = msgspec.json.schema(kind)
    for definition in schema["$defs"].values():
        definition.pop("description", None)  # the docstring, which is for those who read the code
        if "properties" in definition:
            definition["additionalProperties"] = False
            for name, field in definition["properties"].items():
                # msgspec tells of this default since 0.23.
                if field.get("type") == "object" and name not in definition.get("required", []):
                    field.setdefault("default", {})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": kind.__name__.lower(), **schema}


def field_table(kind: type, leave_out: tuple[str, ...] = ()) -> str:
    """Return a Markdown table of all fields, those of tables within it too."""
    schema = json_schema(kind)
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field, default in _fields(schema, schema, ""):
        if name not in leave_out:
            meaning = field.get("description", "")
            assert meaning, f"{kind.__name__}.{name} has no description"
            rows.append(f"| `{name}` | {_words(schema, field)} | {default} | {meaning} |")
    return "\n".join(rows)


def put_tables(page: str, tables: dict[str, str]) -> str:
    """Return a page with every table between its marks."""
    for name, text in tables.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        page, count = re.subn(pattern, lambda m, text=text: m[1] + text + "\n" + m[2], page, flags=re.DOTALL)  # type: ignore[misc]
        assert count == 1, f"the page needs one place for the table {name}"
    return page


def _fields(schema: dict[str, Any], of: dict[str, Any], prefix: str) -> list[tuple[str, dict[str, Any], str]]:
    found = []
    of = _resolved(schema, of)
    required = of.get("required", [])
    for name, field in of.get("properties", {}).items():
        default = "required" if name in required else f"`{json.dumps(field['default'])}`" if "default" in field else ""
        found.append((prefix + name, field, default))
        for inner, path in _inside(field, prefix + name):
            if "$ref" in inner:
                found += _fields(schema, inner, f"{path}.")
    return found


def _inside(field: dict[str, Any], path: str) -> list[tuple[dict[str, Any], str]]:
    """Return the parts of a field that may be tables, each with its path."""
    found = [(part, path) for part in (field, *field.get("anyOf", []))]
    if isinstance(field.get("additionalProperties"), dict):
        found.append((field["additionalProperties"], f"{path}.NAME"))
    return found


def _resolved(schema: dict[str, Any], field: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in field:
        definition: dict[str, Any] = schema["$defs"][field["$ref"].rpartition("/")[2]]
        return definition
    return field


def _words(schema: dict[str, Any], field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{value}`" if value is not None else "null" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(_words(schema, part) for part in field["anyOf"])
    if "$ref" in field:
        return "table"
    kind = field.get("type")
    if kind == "array":
        return f"list of {_words(schema, field['items'])}"
    if kind == "object":
        return f"table of {_words(schema, field['additionalProperties'])} by name"
    least = field.get("minimum", field.get("exclusiveMinimum"))
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
    }
    more = (
        ""
        if kind == "string" or least is None or least < 0
        else f" {'>' if 'exclusiveMinimum' in field else '>='} {least}"
    )
    return words[kind] + more if isinstance(kind, str) else "?"
