"""A decoder's dense part as ExecuTorch operators of our own, instead of XNNPACK's delegate.

Each has a meaning in torch, which is what the exporter traces and tests compare with; on the device it is a function of
the native kernels (``runtime/native/engines/operators.h``), which read int4 weights from the mapped program as they are stored.
They are the operations of :mod:`edgekv.export.ops`, with products by int4 weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from .weights import GROUP, QuantisedLinear, packed_codes

Tensor = torch.Tensor

_LIBRARY = torch.library.Library("edgekv_device", "DEF")  # type: ignore[no-untyped-call]


def _define(name: str, inputs: str, outputs: tuple[str, ...], meaning: Callable[..., Any]) -> None:
    """Define an operator and its form that writes into tensors that it is given, which is the one on the device."""

    def into(*arguments: Any, **given: Tensor) -> Any:
        results = meaning(*arguments)
        for output, result in zip(outputs, results if len(outputs) > 1 else (results,), strict=True):
            given[output].copy_(result)
        return tuple(given[output] for output in outputs) if len(outputs) > 1 else given[outputs[0]]

    letters = "abc"[: len(outputs)]
    plain = ", ".join("Tensor" for _ in outputs)
    written = ", ".join(f"Tensor({letter}!)" for letter in letters)
    named = ", ".join(f"Tensor({letter}!) {output}" for letter, output in zip(letters, outputs, strict=True))
    returned = (plain, written) if len(outputs) == 1 else (f"({plain})", f"({written})")
    for signature, function in (
        (f"{name}({inputs}) -> {returned[0]}", meaning),
        (f"{name}.out({inputs}, *, {named}) -> {returned[1]}", into),
    ):
        _LIBRARY.define(signature)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(signature.split("(")[0], function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _linear_int4(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    numbers = torch.stack([codes & 15, codes >> 4], dim=-1).reshape(*scales.shape, GROUP).float() - 8
    return F.linear(x, (numbers * scales.float().unsqueeze(-1)).reshape(codes.shape[0], -1), bias)


_define("linear_int4", "Tensor x, Tensor codes, Tensor scales, Tensor? bias", ("out",), _linear_int4)
_define("rms_norm", "Tensor x, Tensor weight, float eps", ("out",), ops._rms_norm)
_define("add_rms_norm", "Tensor x, Tensor residual, Tensor weight, float eps", ("out", "total"), ops._add_rms_norm)
_define("swiglu", "Tensor gate, Tensor up", ("out",), ops._swiglu)
_define("geglu", "Tensor gate, Tensor up", ("out",), ops._geglu)
_define("rotary", "Tensor x, Tensor cos, Tensor sin", ("out",), ops._rotary)


class Int4Linear(nn.Module):
    """A linear layer on int4 weights: codes [rows, columns / 2] uint8, scales [rows, columns / 32] bfloat16."""

    def __init__(self, quantised: QuantisedLinear, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", packed_codes(quantised.codes))
        self.register_buffer("scales", quantised.scales)
        self.bias = None if bias is None else nn.Parameter(bias.data, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Project x [T, columns] to [T, rows]."""
        result: Tensor = torch.ops.edgekv_device.linear_int4(x, self.codes, self.scales, self.bias)
        return result


@contextlib.contextmanager
def device_operations() -> Iterator[None]:
    """Make the decoder's operations those of the device while it is traced."""
    device = torch.ops.edgekv_device

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        normed: Tensor = device.rms_norm(x - x.mean(-1, keepdim=True), weight, eps)
        return normed if bias is None else normed + bias

    def add_layer_norm(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
        return layer_norm(total, weight, bias, eps), total

    with mock.patch.multiple(
        ops,
        rms_norm=device.rms_norm,
        add_rms_norm=device.add_rms_norm,
        layer_norm=layer_norm,
        add_layer_norm=add_layer_norm,
        rotary=device.rotary,
        swiglu=device.swiglu,
        geglu=device.geglu,
    ):
        yield
