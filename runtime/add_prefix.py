"""Computes a prefix with a bundle and keeps it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgekv.errors import StoreError, UsageError
from edgekv.files import make_own_folder, reason
from edgekv.scratch import HIDDEN, ScratchFolder

from .generate import Generator
from .options import RunOptions, SessionOptions
from .sessions.prefixes import key_name, limit_bytes, prefix_name, prefix_root, shrink, unit_tokens
from .sessions.tools import verify


def add_prefix(
    folder: Path, tokens: Sequence[int], options: RunOptions, *, name: str = "", limit: int | None = None
) -> tuple[Path, int]:
    """Compute a prefix with a bundle and keep it; one that is there already, and whole, is only marked as used.

    Args:
        folder: the bundle. name: shown by ``edgekv prefix list``. limit: bytes of all prefixes at the most.

    Returns:
        where it is, and how many tokens it has: it ends where prefill is cut.

    Raises:
        UsageError: it is shorter than a step of prefill, or larger than the limit. StoreError: it could not be written.
    """
    limit = limit_bytes() if limit is None else limit
    root = prefix_root()
    try:
        make_own_folder(root)
        with ScratchFolder(root, HIDDEN) as scratch:
            made = scratch.path / "prefix.kv"
            try:
                with Generator.open(folder, replace(options, session=SessionOptions(made, 0))) as generator:
                    manifest = generator.manifest
                    unit = unit_tokens(manifest, options.prefill_chunk)
                    whole = len(tokens) // unit * unit
                    if not whole:
                        raise UsageError(
                            f"a prefix of {len(tokens)} tokens is shorter than a step of prefill, {unit}; nothing would be saved"
                        )
                    folder_of = key_name(manifest, options.prefill_chunk, generator.computed_by)
                    path = root / folder_of / prefix_name(manifest, tokens[:whole])
                    if _holds(path, whole):
                        return path, whole
                    generator.prefill(tokens[:whole], max_tokens=0)
                    assert generator.session is not None
                    generator.session.notes["name"] = name
            except StoreError as error:  # which names a folder that nobody can look at
                raise StoreError(
                    f"cannot keep this prefix in {root}: it is full, or refuses to be written; free some space there, remove"
                    f" others (edgekv prefix rm), or let $XDG_CACHE_HOME name another folder"
                ) from error
            size = sum(file.stat().st_blocks * 512 for file in made.iterdir())
            if size > limit:
                raise UsageError(f"this prefix takes {size} bytes, above the limit of {limit}; raise it with --limit")
            make_own_folder(path.parent)
            if not _holds(path, whole):
                _put(scratch, made, path, whole)
    except OSError as error:
        raise StoreError(
            f"cannot write the prefixes {root}: {reason(error)}; let $XDG_CACHE_HOME name a folder that can be written"
        ) from error
    shrink(limit, keep=path)
    return path, whole


def _put(scratch: ScratchFolder, made: Path, path: Path, whole: int) -> None:
    try:
        scratch.put(made, path)
    except OSError:
        if not _holds(path, whole):  # else another process computed the same, and was first
            raise


def _holds(path: Path, whole: int) -> bool:
    """Say whether a prefix is there with all its tokens, and mark it as used."""
    with contextlib.suppress(StoreError, UsageError, OSError):
        problems, usable = verify(path)
        if not problems and usable >= whole:
            os.utime(path)
            return True
    return False
