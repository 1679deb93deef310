"""edgekv: virtual memory for attention. Importing it loads neither torch nor an inference engine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekv.errors import EdgeKVError as EdgeKVError
    from edgekv.runtime.generate import Generator as Generator
    from edgekv.runtime.manager import MemoryManager as MemoryManager

__version__ = "0.1.0"

_PUBLIC = {
    "EdgeKVError": "edgekv.errors",
    "Generator": "edgekv.runtime.generate",
    "MemoryManager": "edgekv.runtime.manager",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'edgekv' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
