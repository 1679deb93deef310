"""How to run a bundle, and where files go that may be deleted at any time."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from edgekv.runtime.session import SessionOptions
from edgekv.types import KVMode


@dataclass(frozen=True)
class RunOptions:
    """How to run a bundle.

    ``kv_budget``: bytes, ``"64MiB"``, ``"25%"`` of the fp16 cache of the context, or None for no limit.
    ``context``: tokens in the sequence at the most; None takes what the prompt and ``max_tokens`` need.
    ``offload``: folder for pages that do not fit; None uses a private file in the cache folder of the user.
    ``allow_drop``: forget pages that do not fit, instead of writing them to flash (unless ``offload`` names a
    folder); changes results, and says how much.
    """

    kv_budget: int | str | None = None
    kv: KVMode = KVMode.AUTO
    context: int | None = None
    policy: str = "lru"
    offload: Path | None = None
    allow_drop: bool = False
    threads: int = field(default_factory=lambda: default_threads())
    prefill_chunk: int = 256
    session: SessionOptions | None = None


def default_threads() -> int:
    """Cores that this process may use, 4 at the most: decode is bound by memory, and little cores slow big ones."""
    with contextlib.suppress(AttributeError):
        return min(4, len(os.sched_getaffinity(0)))
    return min(4, os.cpu_count() or 1)


def cache_home() -> Path:
    """Folder for files that may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekv"
