"""Writes nodes by hand, where a torch module would not say which operators are meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper


class Nodes:
    """Nodes in the making: a call appends one and gives the name of what it computes."""

    def __init__(self, scope: str = "", constants: dict[str, TensorProto] | None = None) -> None:
        self.scope = scope
        self.nodes: list[onnx.NodeProto] = []
        #: Shared by a graph and the branches in it.
        self.constants: dict[str, TensorProto] = {} if constants is None else constants

    def __call__(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output."""
        output = f"{self.scope}{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, value: NDArray[Any] | np.generic) -> str:
        """Return the name of a constant."""
        array = np.asarray(value)
        name = f"constant_{array.dtype}_{array.tolist()}"
        self.constants[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def ints(self, *values: int) -> str:
        """Return the name of a constant list of int64: a shape, or axes."""
        return self.constant(np.array(values, np.int64))

    def branch(self, name: str) -> Nodes:
        """Return the nodes of a graph inside this one, a branch or a body; they see all that this graph computed so far."""
        return Nodes(f"{self.scope}{name}/", self.constants)

    def as_graph(self, *outputs: tuple[str, int], inputs: Sequence[tuple[str, int]] = ()) -> onnx.GraphProto:
        """Return them as a graph with these float outputs, each with its number of dimensions, and inputs of these types."""
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name, rank in outputs]
        given = [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs]
        return helper.make_graph(self.nodes, self.scope.rstrip("/"), given, values)
