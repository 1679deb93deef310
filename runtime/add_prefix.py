"""Computes a prefix with a bundle and keeps it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgekv.errors import UsageError

from .generate import Generator
from .options import RunOptions, SessionOptions
from .sessions.prefixes import key_name, limit_bytes, prefix_name, prefix_root, shrink


def add_prefix(
    folder: Path, tokens: Sequence[int], options: RunOptions, *, name: str = "", limit: int | None = None
) -> tuple[Path, int]:
    """Compute a prefix with a bundle and keep it; one that is there already is only marked as used.

    Args:
        folder: the bundle. name: shown by ``edgekv prefix list``. limit: bytes of all prefixes at the most.

    Returns:
        where it is, and how many tokens it has: whole pages only.

    Raises:
        UsageError: it is shorter than a page, or larger than the limit. StoreError: it could not be written.
    """
    limit = limit_bytes() if limit is None else limit
    prefix_root().mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=prefix_root(), prefix=".new-") as scratch:
        made = Path(scratch) / "prefix.kv"
        with Generator.open(folder, replace(options, session=SessionOptions(made, 0))) as generator:
            manifest = generator.manifest
            whole = len(tokens) // manifest.page_size * manifest.page_size
            if not whole:
                raise UsageError(
                    f"a prefix of {len(tokens)} tokens does not fill a page of {manifest.page_size}; nothing would be saved"
                )
            path = prefix_root() / key_name(manifest) / prefix_name(manifest, tokens[:whole])
            if path.exists():
                os.utime(path)
                return path, whole
            generator.prefill(tokens[:whole], max_tokens=0)
            assert generator.session is not None
            generator.session.notes["name"] = name
        size = sum(file.stat().st_blocks * 512 for file in made.iterdir())
        if size > limit:
            raise UsageError(f"this prefix takes {size} bytes, above the limit of {limit}; raise it with --limit")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.rename(made, path)
    shrink(limit, keep=path)
    return path, whole
