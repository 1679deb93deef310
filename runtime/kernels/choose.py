"""Which kernels run: the native ones, or their NumPy twins."""

from __future__ import annotations

import importlib
from typing import Literal, cast

from edgekv.settings import Choice

from .interface import Kernels


def load_kernels(prefer: Literal["auto", "native", "numpy"] = "auto") -> Kernels:
    """Return the kernels: native if the extension can be imported, else NumPy (unless "native" is demanded).

    A caller tells which by ``isa()``: "numpy" after prefer="auto" means that the extension is missing, and is
    worth one line of warning.

    Raises:
        ImportError: prefer is "native" and the extension cannot be imported.
        ValueError: prefer is something else. UsageError: EDGEKV_ISA names no instruction set of this processor.
    """
    if prefer not in ("auto", "native", "numpy"):
        raise ValueError(f"prefer must be auto, native or numpy, not {prefer!r}")
    if prefer != "numpy":
        try:
            native = importlib.import_module("edgekv.runtime._kernels")
        except ImportError:
            if prefer == "native":
                raise
        else:
            Choice("isa", native.available_isas()).environment("EDGEKV_ISA")
            return cast(Kernels, native)
    return cast(Kernels, importlib.import_module("edgekv.runtime.kernels.numpy_attention"))
