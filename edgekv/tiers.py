"""Tiers, and the modes that say when a page changes its tier."""

from __future__ import annotations

import enum
from typing import Final


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


class Together(str, enum.Enum):
    """Whether the next tokens of several answers are computed in one step."""

    AUTO = "auto"  #: where each then gets the same bits as alone, and sooner, which is tried at the start
    ALWAYS = "always"  #: the last bits of an answer may depend on what else is answered
    NEVER = "never"
