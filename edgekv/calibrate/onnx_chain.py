"""A chain of matrix products as an ONNX model, written byte by byte: the device side has no `onnx` package.

Field numbers are those of onnx.proto3 (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_FLOAT, _UINT8, _INT = 1, 2, 2
_BLOCK = 32
_IR_VERSION, _OPSET = 10, 21


def matmul_chain(width: int, layers: int, bits: int) -> bytes:
    """Return a model x [rows, width] -> y [rows, width] float32 of ``layers`` products with matrices of their own.

    Args:
        width: rows and columns of each matrix, a multiple of 32.
        bits: 4 or 8 for MatMulNBits as the export writes it, 32 for float32.
    """
    rng = np.random.default_rng(0)
    nodes, weights = b"", b""
    for layer in range(layers):
        source, target = f"x{layer}", f"x{layer + 1}"
        if bits == 32:
            weights += _message(
                5, _tensor(f"w{layer}", rng.standard_normal((width, width), np.float32) * np.float32(1 / width))
            )
            nodes += _message(1, _node("MatMul", [source, f"w{layer}"], target))
            continue
        blocks = width // _BLOCK
        codes = rng.integers(0, 256, (width, blocks, _BLOCK * bits // 8), np.uint8)
        weights += _message(5, _tensor(f"w{layer}", codes))
        weights += _message(5, _tensor(f"s{layer}", np.full((width, blocks), 1e-3, np.float32)))
        shape = {"K": width, "N": width, "bits": bits, "block_size": _BLOCK, "accuracy_level": 4}
        nodes += _message(1, _node("MatMulNBits", [source, f"w{layer}", f"s{layer}"], target, "com.microsoft", shape))
    ends = _message(11, _value("x0", width)) + _message(12, _value(f"x{layers}", width))
    graph = nodes + _message(2, b"chain") + weights + ends
    opsets = b"".join(
        _message(8, _message(1, domain.encode()) + _number(2, version))
        for domain, version in (("", _OPSET), ("com.microsoft", 1))
    )
    return _number(1, _IR_VERSION) + opsets + _message(7, graph)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _tensor(name: str, array: NDArray[np.float32] | NDArray[np.uint8]) -> bytes:
    dims = b"".join(_number(1, size) for size in array.shape)
    kind = _FLOAT if array.dtype == np.float32 else _UINT8
    return dims + _number(2, kind) + _message(8, name.encode()) + _message(9, array.tobytes())


def _node(kind: str, inputs: list[str], output: str, domain: str = "", numbers: dict[str, int] | None = None) -> bytes:
    parts = b"".join(_message(1, name.encode()) for name in inputs) + _message(2, output.encode())
    parts += _message(3, output.encode()) + _message(4, kind.encode())
    for name, value in (numbers or {}).items():
        parts += _message(5, _message(1, name.encode()) + _number(3, value) + _number(20, _INT))
    return parts + _message(7, domain.encode())


def _value(name: str, width: int) -> bytes:
    dims = _message(1, _message(2, b"rows")) + _message(1, _number(1, width))
    return _message(1, name.encode()) + _message(2, _message(1, _number(1, _FLOAT) + _message(2, dims)))
