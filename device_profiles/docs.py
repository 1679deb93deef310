"""The table of fields in docs/profiles.md. ``python -m edgekv.device_profiles.docs docs/profiles.md`` renews it."""

from __future__ import annotations

import sys
from pathlib import Path

from .schema import Compute, Flash, Memory, Thermal, rules

BEGIN = "<!-- fields: begin (generated: python -m edgekv.device_profiles.docs docs/profiles.md) -->"
END = "<!-- fields: end -->"

_SECTIONS = {"memory": Memory, "compute.ENGINE": Compute, "flash": Flash, "thermal": Thermal}


def render_fields() -> str:
    """Return the fields of the schema as Markdown, one table per section."""
    lines = []
    for name, section in _SECTIONS.items():
        lines += [f"### `[{name}]`", "", "| field | unit | allowed | meaning |", "|---|---|---|---|"]
        for key, rule in rules(section).items():
            lines.append(f"| `{key}` | {rule.unit or 'word'} | {rule.limits} | {rule.about} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def update(text: str) -> str:
    """Return the page with its generated part renewed.

    Raises:
        ValueError: the markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{render_fields()}\n\n{END}{after}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(update(page.read_text(encoding="utf-8")), encoding="utf-8")
