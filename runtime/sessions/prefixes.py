"""The prefix cache: long prompts that many runs begin with, computed once.

A prefix is a session in ``prefixes/`` of the cache folder, read-only once it is made. A run that begins with it takes its
pages from there; a new session shares its page files by hard links, so the file system counts who still needs them, and
removing a prefix never breaks a session. When the prefixes exceed their limit, those not used for longest go.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekv.bundle import Manifest
from edgekv.errors import SessionError, SessionMismatch, StoreError, UsageError
from edgekv.files import is_own_folder
from edgekv.scratch import HIDDEN, ScratchFolder
from edgekv.settings import PREFIX_BYTES

from ..options import SessionOptions
from ..system.process import cache_home
from .folder import bits_key, read_state
from .index import chain
from .session import Session

#: What all prefixes together take at the most; ``EDGEKV_PREFIX_BYTES`` or ``edgekv prefix add --limit`` changes it.
DEFAULT_LIMIT_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Prefix:
    """One entry. ``used_at``: seconds since 1970; ``key``: which bundles it fits."""

    path: Path
    tokens: int
    bytes_on_flash: int
    used_at: float
    checkpoint: str
    name: str


def prefix_root() -> Path:
    """Folder of all prefixes."""
    return cache_home() / "prefixes"


def limit_bytes() -> int:
    """Return the size limit of the cache in bytes.

    Raises:
        UsageError: ``EDGEKV_PREFIX_BYTES`` is not a size.
    """
    return PREFIX_BYTES.environment(PREFIX_BYTES.name) or DEFAULT_LIMIT_BYTES


def list_prefixes() -> list[Prefix]:
    """Return all prefixes, the last used first; damaged ones with 0 tokens.

    Raises:
        StoreError: the folder cannot be read.
    """
    found = []
    try:
        paths = [path for folder in _folders(prefix_root()) for path in _folders(folder)]
    except OSError as error:
        raise StoreError(f"cannot read the prefixes {prefix_root()}: {error.strerror}") from error
    for path in paths:
        with contextlib.suppress(SessionError, SessionMismatch, FileNotFoundError):  # removed meanwhile
            state = read_state(path, None)
            found.append(
                Prefix(
                    path,
                    len(state.rows) * (state.meta.pages.page_size if state.meta else 0),
                    sum(file.stat().st_blocks * 512 for file in path.iterdir()),
                    path.stat().st_mtime,
                    str(state.meta.key.get("checkpoint", "")) if state.meta else "",
                    str(state.notes.get("name", "")),
                )
            )
    return sorted(found, key=lambda prefix: -prefix.used_at)


def _folders(path: Path) -> list[Path]:
    """Return the folders in one, none if it is not there; what is hidden is only on its way."""
    try:
        return sorted(entry for entry in path.iterdir() if not entry.name.startswith(".") and entry.is_dir())
    except FileNotFoundError:
        return []


def find_prefix(manifest: Manifest, prompt: Sequence[int], chunk: int, computed_by: str) -> tuple[Path, int] | None:
    """Return the prefix that saves most of the prefill of a prompt, and how many tokens it saves, or None.

    What is saved was computed by the same bundle, engine and kernels, and ends where a run without the prefix cuts its prefill
    too, so that both give the same bits. A prefix that cannot be read is passed over.
    """
    size, unit = manifest.page_size, unit_tokens(manifest, chunk)
    folder = prefix_root() / key_name(manifest, chunk, computed_by)
    # Keys and values that others may have changed could make a model say anything.
    if len(prompt) <= unit or not (is_own_folder(prefix_root()) and is_own_folder(folder)):
        return None
    start = chain(b"", prompt[:size]).hex()
    best: tuple[Path, int] | None = None
    for path in sorted(folder.glob(f"{start}-*")):
        with contextlib.suppress(StoreError, SessionMismatch):
            rows = read_state(path, None).rows
            shared = 0
            while shared < min(len(rows), (len(prompt) - 1) // size):
                if tuple(prompt[shared * size : shared * size + size]) != rows[shared].tokens:
                    break
                shared += 1
            saved = shared * size // unit * unit
            if saved and (best is None or saved > best[1]):
                best = (path, saved)
    return best


def open_prefix(path: Path, manifest: Manifest) -> Session | None:
    """Open a prefix for reading, and mark it as used; None: it cannot be read. The caller closes it."""
    with contextlib.suppress(OSError):
        os.utime(path)
    try:
        session = Session.open(SessionOptions(path), manifest, save=False)
    except (StoreError, SessionMismatch, UsageError):
        return None
    session.read_only = "it is a shared prefix"
    return session


def unit_tokens(manifest: Manifest, chunk: int) -> int:
    """Return what the length of a prefix is a multiple of: it ends with a page, and where prefill is cut."""
    return math.lcm(manifest.page_size, chunk)


def shrink(limit: int, keep: Path | None = None) -> list[Path]:
    """Remove the prefixes that were not used for longest until all take ``limit`` bytes at the most; returns which."""
    prefixes = list_prefixes()
    total = sum(prefix.bytes_on_flash for prefix in prefixes)
    gone = []
    for prefix in reversed(prefixes):
        if total <= limit:
            break
        if prefix.path != keep:
            total -= prefix.bytes_on_flash
            if remove_prefix(prefix.path):
                gone.append(prefix.path)
    return gone


def remove_prefix(path: Path) -> bool:
    """Remove a prefix, unless another process was first; sessions that began with it keep its pages.

    Raises:
        UsageError: it is no prefix. StoreError: it cannot be removed.
    """
    if path.parent.parent != prefix_root():
        raise UsageError(f"there is no prefix {path.name}; edgekv prefix list shows them")
    try:
        with ScratchFolder(prefix_root(), HIDDEN) as scratch:
            path.rename(scratch.path / path.name)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StoreError(f"cannot remove the prefix {path.name}: {error.strerror}") from error
    return True


def key_name(manifest: Manifest, chunk: int, computed_by: str) -> str:
    """Return the folder of the prefixes that fit a bundle, and a run that cuts its prefill every ``chunk`` tokens.

    Args:
        computed_by: see :func:`bits_key`.
    """
    key = {**bits_key(manifest, computed_by), "prefill_chunk": chunk}
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def prefix_name(manifest: Manifest, tokens: Sequence[int]) -> str:
    """Return the name of a prefix, first page, then everything: what a run looks for, and what makes the name unique."""
    size = manifest.page_size
    return f"{chain(b'', tokens[:size]).hex()}-{chain(b'', tokens).hex()[:8]}"
