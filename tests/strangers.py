"""Another user on the same machine, for tests that run as root: without rights, or as the owner of files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can stand for another user")


@contextmanager
def without_rights() -> Iterator[Path]:
    """Be a user whom permissions bind, in a folder of that user's own; who is no root is one already."""
    folder = Path(tempfile.mkdtemp(prefix="edgekv-test-"))
    root = os.geteuid() == 0
    try:
        if root:
            os.chown(folder, NOBODY, -1)
            os.seteuid(NOBODY)
        yield folder
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(folder)
