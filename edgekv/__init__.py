"""edgekv: virtual memory for attention. Importing it loads neither torch nor an inference engine."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekv.errors import EdgeKVError as EdgeKVError
    from edgekv.runtime.generate import Generator as Generator
    from edgekv.runtime.memory_manager import MemoryManager as MemoryManager

__version__ = "0.1.0"

#: What keeps engines from reporting home (a device id and a database in the cache folder, a name to look up, an upload).
#: ONNX Runtime and its GenAI read it once, when they load, so it is said here, before anything of edgekv can load one.
NO_TELEMETRY = {
    "ORT_DISABLE_TELEMETRY": "1",
    "ORT_GENAI_TELEMETRY_DISABLED": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
os.environ.update(NO_TELEMETRY)

_PUBLIC = {
    "EdgeKVError": "edgekv.errors",
    "Generator": "edgekv.runtime.generate",
    "MemoryManager": "edgekv.runtime.memory_manager",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'edgekv' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
