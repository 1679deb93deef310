"""The small words that everything else shares: tiers, modes, and sizes in bytes."""

from __future__ import annotations

import enum
import re
from typing import Final

from edgekv.errors import UsageError


class Tier:
    """Where the keys and values of a page are; the order is the cost of reaching them.

    Plain integers, not an enumeration: they are compared with NumPy's numbers in every step, and NumPy asks an enumeration for
    its type in Python code, in which a Ctrl-C is lost.
    """

    HOT: Final = 0  #: RAM, fp16
    WARM: Final = 1  #: RAM, INT8
    COLD: Final = 2  #: flash, INT8
    REMOTE: Final = 3  #: object store, INT8
    DROPPED: Final = 4  #: tokens known, keys and values gone
    FREE: Final = 5  #: no page here (never written, or every token pruned)

    #: Of the tiers that hold pages, in their order.
    NAMES: Final = ("HOT", "WARM", "COLD", "REMOTE", "DROPPED")


class KVMode(str, enum.Enum):
    """When a page is compressed to INT8."""

    AUTO = "auto"  #: fp16 if the whole context fits the budget, INT8 at seal otherwise
    FP16 = "fp16"  #: only when memory runs out
    INT8 = "int8"  #: as soon as a page is full


class PressureMode(str, enum.Enum):
    """Whether a run answers to a system that runs short of memory."""

    AUTO = "auto"  #: what the system says is watched
    IGNORE = "ignore"


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
