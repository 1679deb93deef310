"""A medium that answers EIO: the error comes from the system call itself, from a library that is loaded before the C library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("eio.c")


def dying_medium(folder: Path, sign: Path, files: str = "/pages-") -> dict[str, str]:
    """Return the environment of a process for which files of this name cannot be read once ``sign`` exists."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and LD_PRELOAD")
    library = folder / "eio.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return {**os.environ, "LD_PRELOAD": str(library), "EDGEKV_EIO": str(sign), "EDGEKV_EIO_FILES": files}
