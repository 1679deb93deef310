"""Embedding rows, looked up in the mapped weights: only the rows that are used become resident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.bundle import EmbeddingSpec
from edgekv.errors import BundleError
from edgekv.spec import ModelSpec

#: Channels that share one scale in an int8 or int4 row.
BLOCK = 32


class Embedding:
    """The embedding table of a split bundle, in the form that :class:`edgekv.bundle.EmbeddingSpec` describes."""

    def __init__(self, folder: Path, spec: EmbeddingSpec, model: ModelSpec) -> None:
        self._dtype = spec.dtype
        path, rows, hidden = folder / spec.file, model.vocab_size, model.hidden_size
        self._scales: NDArray[np.float32] | None = None
        self._rows: NDArray[Any]
        if spec.dtype in ("float32", "float16"):
            self._rows = np.memmap(path, np.dtype(spec.dtype), "r", spec.offset, (rows, hidden))
        elif spec.dtype in ("int8", "int4"):
            width = hidden if spec.dtype == "int8" else hidden // 2
            self._rows = np.memmap(path, np.uint8, "r", spec.offset, (rows, width))
            self._scales = np.memmap(path, np.float32, "r", spec.scales_offset, (rows, hidden // BLOCK))
        else:
            raise BundleError(f"unknown embedding type {spec.dtype!r} in the manifest; export the bundle again")

    def look_up(self, tokens: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """Write the rows of tokens [T] to out [T, hidden_size] float32."""
        rows = self._rows[tokens]
        if self._scales is None:
            out[:] = rows
            return
        if self._dtype == "int8":
            codes = rows.astype(np.float32) - 128
        else:
            codes = np.stack([rows & 15, rows >> 4], axis=-1).astype(np.float32) - 8
        blocks = codes.reshape(len(tokens), -1, BLOCK) * self._scales[tokens][:, :, None]
        out[:] = blocks.reshape(out.shape)
