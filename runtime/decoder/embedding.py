"""Embedding rows, read from the weights file as they are needed.

Reads, not a mapping: the kernel maps sixteen pages around each row that is touched, and a long prompt would bring the
whole table into the process.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.bundle import EmbeddingSpec
from edgekv.spec import ModelSpec

_BYTES = np.arange(256)
_NIBBLES = (np.stack([_BYTES & 15, _BYTES >> 4], axis=1) - 8).astype(np.float32)
#: What each byte of a row means, without its scale: one code of 8 bits, two of 4, the low one first.
_CODES = {
    "int8": (_BYTES[:, None] - 128).astype(np.float32),
    "int4": _NIBBLES,
    "int8_row": _BYTES[:, None].astype(np.int8).astype(np.float32),
    "int4_bfloat16": _NIBBLES,
}


class Embedding:
    """The embedding table of a split bundle, in the form that :class:`edgekv.bundle.EmbeddingSpec` describes."""

    def __init__(self, folder: Path, spec: EmbeddingSpec, model: ModelSpec) -> None:
        self._spec = spec
        self._codes = _CODES.get(spec.dtype)
        self._dtype: np.dtype[Any] = np.dtype(np.uint8 if self._codes is not None else spec.dtype)
        self._row_bytes = spec.row_bytes(model.hidden_size)
        self._scale_bytes = spec.row_scale_bytes(model.hidden_size)
        self._file = os.open(folder / spec.file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def look_up(self, tokens: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """Write the rows of tokens [T] to out [T, hidden_size] float32."""
        spec = self._spec
        for row, token in zip(out, tokens.tolist(), strict=True):
            values = self._read(spec.offset + token * self._row_bytes, self._row_bytes, self._dtype)
            if self._codes is None:
                row[:] = values
                continue
            scales = self._scales(spec.scales_offset + token * self._scale_bytes)
            blocks = self._codes.take(values, axis=0).reshape(len(scales), -1)
            np.multiply(blocks, scales[:, None], out=row.reshape(blocks.shape))

    def _scales(self, offset: int) -> NDArray[np.float32]:
        if self._spec.layout.scale_bits == 32:
            return self._read(offset, self._scale_bytes, np.dtype(np.float32))
        # bfloat16 is the upper half of a float32.
        halves = self._read(offset, self._scale_bytes, np.dtype(np.uint16))
        return (halves.astype(np.uint32) << 16).view(np.float32)

    def _read(self, offset: int, n_bytes: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        return np.frombuffer(os.pread(self._file, n_bytes, offset), dtype)
