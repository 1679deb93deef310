"""A device profile as people read it: every number with its confidence and its source."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table

from edgekv.device_profiles import DeviceProfile, Quantity

from .output import stdout


def print_profile(profile: DeviceProfile) -> None:
    """Print a table of all fields."""
    table = Table("field", "value", "confidence", "source", box=box.SIMPLE_HEAD)
    for column in table.columns[:3]:
        column.no_wrap = True
    section = ""
    for key, entry in profile.entries().items():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            table.add_section()
            table.add_row(escape(f"[{section}]"))
        if isinstance(entry, Quantity):
            table.add_row(key.rpartition(".")[2], str(entry), entry.confidence, escape(entry.source))
        elif section:
            table.add_row(key.rpartition(".")[2], entry)
    console = stdout()
    processor = f"; {profile.processor}" if profile.processor is not None else ""
    console.print(escape(f"{profile.name}: {profile.title} ({profile.kind}{processor})"))
    console.print(table)
