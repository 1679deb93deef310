"""Sizes in bytes and numbers of parameters, as people write and read them."""

from __future__ import annotations

import re

from edgekv.errors import UsageError

_UNITS = {
    "": 1, "b": 1,
    "k": 1000, "kb": 1000, "kib": 1024,
    "m": 1000**2, "mb": 1000**2, "mib": 1024**2,
    "g": 1000**3, "gb": 1000**3, "gib": 1024**3,
    "t": 1000**4, "tb": 1000**4, "tib": 1024**4,
}  # fmt: skip


#: No size is larger: a billion times a gigabyte.
_LARGEST_BYTES = 2**60


def parse_bytes(text: str) -> int:
    """Read a size such as ``64MiB``, ``1.5 GB``, ``1TB`` or ``4096`` as bytes.

    Raises:
        UsageError: the text is not a size above zero.
    """
    match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"not a size: {text!r}; write it like 64MiB, 1.5GB or a number of bytes")
    size_bytes = int(float(match[1]) * _UNITS[match[2].lower()])
    if not 0 < size_bytes <= _LARGEST_BYTES:
        raise UsageError(f"a size must be above zero and at most 1048576TiB: {text!r}")
    return size_bytes


def format_bytes(size_bytes: float) -> str:
    """Print bytes in the unit of :func:`binary_unit`."""
    unit, factor = binary_unit(size_bytes)
    return f"{size_bytes / factor:.{1 if factor > 1 else 0}f} {unit}"


def binary_unit(size_bytes: float) -> tuple[str, int]:
    """Return the largest binary unit that keeps at least one whole digit, and its bytes."""
    for unit, factor in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if abs(size_bytes) >= factor:
            return unit, factor
    return "B", 1


def format_count(parameters: int) -> str:
    """Print a number of parameters."""
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"
