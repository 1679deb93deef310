"""Gate and up projection as one product: they read the same input, and one product of twice the rows starts threads once.

Only the ONNX graphs are rewritten; other engines get the decoder as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx
from onnx import helper

Sources = dict[str, tuple[str, ...]]
_GATE, _UP = "gate_proj", "up_proj"


def stack_gate_and_up(
    nodes: Iterable[onnx.NodeProto], sources: Mapping[str, tuple[str, ...]]
) -> tuple[list[onnx.NodeProto], Sources]:
    """Return nodes and sources with each pair of gate and up products made one, and a Split behind it."""
    sources = dict(sources)
    stacked: list[onnx.NodeProto] = []
    gates: dict[str, onnx.NodeProto] = {}
    for node in nodes:
        parameters = [name for name in node.input if name in sources]
        owner = parameters[0].rpartition(".")[0] if node.op_type == "Gemm" and parameters else ""
        if owner.endswith(_GATE):
            gates[node.input[0]] = node
        elif owner.endswith(_UP) and node.input[0] in gates:
            stacked += _stack(gates.pop(node.input[0]), node, sources)
        else:
            stacked.append(node)
    assert not gates, "a gate projection without its up projection"
    return stacked, sources


def _stack(gate: onnx.NodeProto, up: onnx.NodeProto, sources: Sources) -> list[onnx.NodeProto]:
    product = onnx.NodeProto()
    product.CopyFrom(gate)
    for i, (ours, theirs) in enumerate(zip(gate.input, up.input, strict=True)):
        if i:
            product.input[i] = ours.replace(_GATE, "gate_up_proj")
            sources[product.input[i]] = sources[ours] + sources[theirs]
    product.output[0] = f"{gate.output[0]}_and_up"
    split = helper.make_node("Split", [product.output[0]], [gate.output[0], up.output[0]], axis=-1, num_outputs=2)
    return [product, split]
