"""With this folder on PYTHONPATH, every Python process takes its kernels from the file that EDGEKV_SANITIZED names."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType


class Sanitized:
    """Finds the kernels that were compiled with a sanitizer, in place of the installed ones."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find one module, and leave all others to the finders behind this one."""
        if name != "edgekv.runtime._kernels":
            return None
        return importlib.util.spec_from_file_location(name, os.environ["EDGEKV_SANITIZED"])


sys.meta_path.insert(0, Sanitized)  # type: ignore[arg-type]
