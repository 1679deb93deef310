"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

from edgekv.errors import UsageError

_UNITS = {
    "": 1, "b": 1,
    "k": 1000, "kb": 1000, "kib": 1024,
    "m": 1000**2, "mb": 1000**2, "mib": 1024**2,
    "g": 1000**3, "gb": 1000**3, "gib": 1024**3,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """Read a size such as ``64MiB``, ``1.5 GB`` or ``4096`` as bytes.

    Raises:
        UsageError: the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"not a size: {text!r}; write it like 64MiB, 1.5GB or a number of bytes")
    size_bytes = int(float(match[1]) * _UNITS[match[2].lower()])
    if size_bytes <= 0:
        raise UsageError(f"a size must be above zero: {text!r}")
    return size_bytes


def format_bytes(size_bytes: float) -> str:
    """Print bytes in the largest binary unit that keeps at least one whole digit."""
    for unit, factor in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes:.0f} B"
