"""Which build of edgekv this is: version, commit, and what its kernels were compiled for."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import edgekv

from .kernels.choose import load_kernels

#: Seconds that git may take to say which commit this is.
_GIT_S = 10


def describe_build() -> str:
    """Return the line of ``edgekv --version``."""
    facts = load_kernels().build()
    names = (
        f"kernels: {facts['isas']}" if facts["isas"] else "kernels: NumPy's, since it was built without a C++ compiler"
    )
    parts = [f"commit {build_commit() or 'unknown'}", facts["processor"], names, facts["c_library"], facts["compiler"]]
    return f"edgekv {edgekv.__version__} ({'; '.join(part for part in parts if part)})"


def build_commit() -> str | None:
    """Return the commit of edgekv: the checkout's that it runs from, or else the one that a wheel was built of."""
    return commit(Path(edgekv.__file__).resolve().parents[1]) or load_kernels().build()["commit"] or None


def commit(root: Path) -> str | None:
    """Return the commit of a checkout, or None: the folder is none itself, or git is not there.

    ``-dirty`` is behind it where files were changed since.
    """
    if not (root / ".git").exists():  # an environment inside of another project's checkout
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
            capture_output=True, text=True, check=True, timeout=_GIT_S, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        ).stdout.strip()  # fmt: skip
    return None
