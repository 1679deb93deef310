"""From a segment of the decoder to an ExecuTorch program: the only file that calls the exporter.

A program made here is a template: its structure counts, its weights are random and are replaced afterwards, once per
layer. So a decoder of any depth costs the tracing and lowering of three segments.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from importlib import metadata
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from edgekv.errors import EngineMissing
from edgekv.logs import quiet

from .. import ops
from ..decoder import Projection
from .operators import Int4Linear, device_operations
from .weights import Constant, QuantisedLinear, check_columns, quantise, quantised_constants, vector_constants

Tensor = torch.Tensor
_INT4: Any = vars(torch)["int4"]  # not in the stubs


def require_executorch() -> str:
    """Return the version of the executorch package.

    Raises:
        EngineMissing: it, or torchao, is not installed.
    """
    try:
        metadata.version("torchao")
        return metadata.version("executorch")
    except metadata.PackageNotFoundError as error:
        raise EngineMissing(
            f"--engine executorch needs the package {error.name}; install it: pip install 'edgekv[export,executorch]'"
        ) from error


def materialise(
    module: nn.Module, name: str, kind: str, seed: int, operators: str = "xnnpack"
) -> tuple[nn.Module, dict[str, list[Constant]]]:
    """Give a module random values, its products as ``kind`` weights; returns it with the constants of each parameter.

    Args:
        name: for messages.
        seed: modules of different seeds share no constant.
    """
    generator = torch.Generator().manual_seed(seed)
    constants: dict[str, list[Constant]] = {}
    module = module.to_empty(device="cpu").requires_grad_(False).eval()
    for parameter_name, parameter in module.named_parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
        constants[parameter_name] = vector_constants(parameter.data)
    for path, quantised in quantise_linears(module, name, kind, operators).items():
        constants[f"{path}.weight"] = quantised_constants(quantised, kind)
    return module, constants


def quantise_linears(
    module: nn.Module,
    name: str,
    kind: str,
    operators: str = "xnnpack",
    known: Mapping[str, QuantisedLinear] = MappingProxyType({}),
) -> dict[str, QuantisedLinear]:
    """Replace every projection of a module by a layer that the exporter knows; returns the quantised ones by path.

    Args:
        name: for messages.
        operators: one of :data:`edgekv.contract.OPERATORS`.
        known: those that are quantised already, by path.
    """
    found = {}
    for path, child in list(module.named_modules()):
        if isinstance(child, Projection):
            check_columns(kind, child.weight.shape[1], f"{name}.{path}")
            linear: nn.Module
            if kind == "fp32":
                linear = _linear(child)
            else:
                found[path] = known[path] if path in known else quantise(child.weight.data, kind)
                if operators == "edgekv":
                    linear = Int4Linear(found[path], child.bias)
                else:
                    linear = dynamic_linear(found[path], child.bias, kind)
            owner, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(owner), leaf, linear)
    return found


def dynamic_linear(quantised: QuantisedLinear, bias: Tensor | None, kind: str) -> nn.Module:
    """Return a linear layer on quantised weights whose input is quantised per token: torchao's, with our codes."""
    rows, columns = quantised.codes.shape
    with quiet():
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
        from torchao.quantization.granularity import PerAxis, PerGroup

    linear = nn.Linear(columns, rows, bias=bias is not None).requires_grad_(False)
    linear.weight.data = quantised.dequantise()
    if bias is not None:
        linear.bias.data = bias.data
    options: dict[str, Any] = {"weight_dtype": torch.int8, "weight_granularity": PerAxis(0)}
    if kind == "int4":
        options = {"weight_dtype": _INT4, "weight_granularity": PerGroup(32)}
        options["weight_scale_dtype"] = torch.bfloat16  # XNNPACK stores group scales as bfloat16
    wrapped = nn.Sequential(linear)
    with quiet():
        quantize_(wrapped, Int8DynamicActivationIntxWeightConfig(**options))
    result = wrapped[0]
    original: Any = (
        result.weight.original_weight_tensor if hasattr(result.weight, "original_weight_tensor") else result.weight
    )
    original.qdata.copy_(quantised.codes)
    original.scale.copy_(quantised.scales.reshape(original.scale.shape))
    return result


def lower(
    modules: Mapping[str, tuple[nn.Module, tuple[Tensor, ...], Any]], *, whole: bool = True, operators: str = "xnnpack"
) -> Any:
    """Export and lower modules to XNNPACK, or to operators of our own, as the methods of one program.

    Args:
        modules: for each method its module, an example of its inputs, and its dynamic shapes or None.
        whole: spell operations so that a delegate takes a whole graph of fixed shapes.
        operators: one of :data:`edgekv.contract.OPERATORS`.

    Returns:
        an ``ExecutorchProgramManager`` whose methods neither allocate inputs nor outputs.
    """
    spelling = _whole_delegates() if whole else contextlib.nullcontext()
    with quiet(), torch.no_grad(), device_operations() if operators == "edgekv" else spelling:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass

        programs = {
            name: torch.export.export(module, example, dynamic_shapes=dynamic, strict=False).run_decompositions(
                {torch.ops.aten.split_with_sizes.default: _split}
            )
            for name, (module, example, dynamic) in modules.items()
        }
        edge = to_edge_transform_and_lower(
            programs,
            partitioner=[] if operators == "edgekv" else [XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=operators != "edgekv"),  # it knows ATen's only
        )
        planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
        return edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))


def _linear(projection: Projection) -> nn.Linear:
    rows, columns = projection.weight.shape
    linear = nn.Linear(columns, rows, bias=projection.bias is not None, device="meta")
    linear.weight = projection.weight
    if projection.bias is not None:
        linear.bias = projection.bias
    return linear.eval()


@contextlib.contextmanager
def _whole_delegates() -> Iterator[None]:
    """Spell the decoder's operations so that XNNPACK takes all of a segment of fixed shape.

    A mean becomes a product with a constant, a new axis a reshape: as they stand, both would run outside the
    delegate and cut it into pieces.
    """
    means: dict[int, Tensor] = {}

    def mean(x: Tensor) -> Tensor:
        width = x.shape[-1]
        if width not in means:
            with torch._subclasses.fake_tensor.unset_fake_temporarily():
                means[width] = torch.full((1, width), 1.0 / width)
        return F.linear(x, means[width])

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(mean(x * x) + eps) * weight

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return rms_norm(total, weight, eps), total

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        normed = rms_norm(x - mean(x), weight, eps)
        return normed if bias is None else normed + bias

    def add_layer_norm(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
        return layer_norm(total, weight, bias, eps), total

    def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = cos.shape[-1]
        cos, sin = (part.reshape(part.shape[0], 1, half) for part in (cos, sin))
        first, second = x[..., :half], x[..., half : 2 * half]
        parts = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat(parts if 2 * half == x.shape[-1] else [*parts, x[..., 2 * half :]], dim=-1)

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def geglu(gate: Tensor, up: Tensor) -> Tensor:
        return gelu_tanh(gate) * up

    def gelu_tanh(x: Tensor) -> Tensor:
        # gelu by tanh is a sigmoid: x (1 + tanh(u)) / 2 = x sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x ** 3).
        twice = math.sqrt(8 / math.pi)
        return x * torch.sigmoid(x * (x * x * (0.044715 * twice) + twice))

    with mock.patch.multiple(
        ops,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        layer_norm=layer_norm,
        add_layer_norm=add_layer_norm,
        rotary=rotary,
        swiglu=swiglu,
        geglu=geglu,
        gelu_tanh=gelu_tanh,
    ):
        yield


def _split(x: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
    """Split by slices, which XNNPACK takes."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [torch.ops.aten.slice.Tensor(x, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]
