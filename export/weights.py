"""One file for the weights of all graphs of a bundle, each distinct tensor stored once.

Invariant: equal bytes have one offset. Offsets of large tensors are multiples of 4096, so that they can be mapped;
small ones are packed to 64.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgekv.errors import CheckpointError
from edgekv.spec import round_up

MAPPED_ALIGN_BYTES = 4096
SMALL_ALIGN_BYTES = 64
SMALL_BYTES = 1 << 16
MAX_HALF = float(np.finfo(np.float16).max)
#: Of the root of the sum of squares of a tensor. Rounding to the 11 bits of fp16 loses 0.0003 at the most, where numbers are not
#: below 6e-5.
MOST_LOST = 0.01
#: Numbers that are compared at a time.
_PART = 1 << 22


def to_half(values: NDArray[np.float32], name: str) -> NDArray[np.float16]:
    """Return the values of a tensor in fp16.

    Raises:
        CheckpointError: one of them is too large, or so many are so small that fp16 changes the tensor by more than MOST_LOST.
    """
    peak = float(np.abs(values).max(initial=0))
    if peak > MAX_HALF:
        raise CheckpointError(
            f"tensor {name} holds {peak:.6g}, and fp16 ends at {MAX_HALF:.0f}; export with --weights fp32, int8 or int4"
        )
    half = values.astype(np.float16)
    lost = total = 0.0
    for exact, rounded in zip(*(np.array_split(each, 1 + each.size // _PART) for each in (values, half)), strict=True):
        lost += float(np.square(rounded - exact, dtype=np.float64).sum())
        total += float(np.square(exact, dtype=np.float64).sum())
    if lost > MOST_LOST**2 * total:
        raise CheckpointError(
            f"tensor {name} holds numbers too small for fp16, which ends at 6e-8: it would differ by"
            f" {math.sqrt(lost / total):.0%}; export with --weights fp32, int8 or int4"
        )
    return half


@dataclass(frozen=True)
class Extent:
    """Where an array lies in a weight file."""

    offset: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]


class WeightFile:
    """Writes arrays to a file; a context manager."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._stream = path.open("wb")
        self._extents: dict[bytes, int] = {}
        self._end = 0

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def put(self, array: NDArray[Any]) -> Extent:
        """Store an array unless its bytes are there already; return where it lies."""
        data = np.ascontiguousarray(array)
        raw = memoryview(data.reshape(-1).view(np.uint8))
        key = hashlib.blake2b(raw, digest_size=32).digest()
        if key not in self._extents:
            align = SMALL_ALIGN_BYTES if data.nbytes < SMALL_BYTES else MAPPED_ALIGN_BYTES
            offset = round_up(self._end, align)
            self._stream.write(b"\0" * (offset - self._end))
            self._stream.write(raw)
            self._extents[key] = offset
            self._end = offset + data.nbytes
        return Extent(self._extents[key], data.nbytes, str(data.dtype), data.shape)

    def tensor(self, name: str, extent: Extent, shape: tuple[int, ...] | None = None) -> onnx.TensorProto:
        """Return an ONNX initializer that reads ``extent``, under another shape if given."""
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(extent.dtype))
        proto = onnx.TensorProto(name=name, data_type=kind, dims=shape or extent.shape)
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.name), ("offset", extent.offset), ("length", extent.size_bytes)):
            proto.external_data.add(key=key, value=str(value))
        return proto
