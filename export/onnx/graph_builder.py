"""Builds one ONNX graph out of pieces: renames their values, binds their weights, lowers their products.

The kind of a matrix decides what a product becomes: Gemm on float32, Cast and Gemm on float16, MatMulNBits on int8 and int4.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

import edgekv
from edgekv.bundle import MatrixFacts
from edgekv.contract import GraphSpec

from ..checkpoint import EMBEDDING, Checkpoint
from ..codes import BLOCK, Codes
from ..decoder import parameter_sources
from ..matrix_kinds import MatrixKinds
from ..rounding import Compensator
from ..weights import Extent, WeightFile, to_half
from .look_up import look_up
from .matmul_nbits import BITS, QuantisedWeight, nearest, pack, quantise
from .nodes import Nodes
from .pieces import OPSET, Piece
from .stack import stack_gate_and_up

CONTRIB = "com.microsoft"
#: MatMulNBits: quantise the activations to INT8 and multiply in integers.
ACCURACY_INT8 = 4
IR_VERSION = 10


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [rows, columns] in the weight file; int8 and int4 have ``scales``, some ``zeros`` and ``offsets``, too."""

    kind: str
    rows: int
    columns: int
    data: Extent
    scales: Extent | None = None
    zeros: Extent | None = None
    offsets: Extent | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all that it is stored as."""
        extents = (self.data, self.scales, self.zeros, self.offsets)
        return sum(extent.size_bytes for extent in extents if extent is not None)


@dataclass
class WeightBinder:
    """Reads tensors from the checkpoint and stores them in the bundle, each once.

    ``compensator`` rounds the int4 products; without it each weight is rounded to the nearest code.
    """

    checkpoint: Checkpoint
    file: WeightFile
    kinds: MatrixKinds
    compensator: Compensator | None = None
    _matrices: dict[tuple[str, tuple[str, ...]], StoredMatrix] = field(default_factory=dict)

    def vector(self, sources: tuple[str, ...]) -> Extent:
        """Store a norm's gain or a bias as float32."""
        return self.file.put(self._read(sources))

    def matrix(self, sources: tuple[str, ...], kind: str | None = None) -> StoredMatrix:
        """Store the rows of ``sources`` as ``kind``, by default their own, in which they agree."""
        key = (kind or self.kinds.of(sources[0]), sources)
        if key not in self._matrices:
            self._matrices[key] = self._store(sources, key[0])
        return self._matrices[key]

    def embedding(self) -> StoredMatrix:
        """Store the embedding. When it is tied it is the output head's own matrix, unless that is int4."""
        kind = self.kinds.of(EMBEDDING)
        if kind in BITS and self.checkpoint.config.model.hidden_size % BLOCK:
            kind = "fp16"  # rows that do not fill their blocks cannot be read by offset
        elif kind == "int4":
            kind = "int8"  # only the rows of the step's tokens are ever read: precision takes flash, and no memory
        table = self.matrix((EMBEDDING,), kind)
        assert table.zeros is table.offsets is None, "rows are looked up by codes and scales alone"
        return table

    def _read(self, sources: tuple[str, ...]) -> Any:
        return np.concatenate([self.checkpoint.tensor(name).numpy() for name in sources])

    def _store(self, sources: tuple[str, ...], kind: str) -> StoredMatrix:
        if kind == "fp16":
            half = np.concatenate([to_half(self.checkpoint.tensor(name).numpy(), name) for name in sources])
            return StoredMatrix(kind, half.shape[0], half.shape[1], self.file.put(half))
        if self.kinds.stored and kind in BITS:
            columns = self.checkpoint.location[sources[0]].shape[1]
            return self._put(kind, columns, pack([self._codes(name, BITS[kind]) for name in sources]))
        if kind == "int4" and self.compensator is not None:
            columns = self.checkpoint.location[sources[0]].shape[1]
            return self._put(kind, columns, pack(self.compensator.codes(sources)))
        value = self._read(sources)
        rows, columns = value.shape
        if kind in BITS:
            return self._put(kind, columns, quantise(value, BITS[kind], symmetric=kind == "int8"))
        return StoredMatrix(kind, rows, columns, self.file.put(value))

    def _codes(self, name: str, bits: int) -> Codes:
        """Return a matrix in so many bits: in the codes that the checkpoint has, or each weight in the nearest."""
        stored = self.checkpoint.location[name].codes
        if stored is not None and stored.bits <= bits:
            codes = stored.read()
            if codes.bits == bits:
                return codes
            if codes.symmetric:
                return codes.in_eight_bits()
        return nearest(self.checkpoint.tensor(name).numpy())

    def _put(self, kind: str, columns: int, quantised: QuantisedWeight) -> StoredMatrix:
        codes, scales = self.file.put(quantised.codes), self.file.put(quantised.scales)
        zeros, offsets = (
            None if each is None else self.file.put(each) for each in (quantised.zeros, quantised.offsets)
        )
        return StoredMatrix(kind, len(quantised.codes), columns, codes, scales, zeros, offsets)


class GraphBuilder:
    """Collects nodes and initializers; :meth:`save` writes the graph that ``spec`` promises.

    Attributes:
        matrices: what its products read, by kind.
    """

    def __init__(self, binder: WeightBinder) -> None:
        self.binder = binder
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.matrices: dict[str, MatrixFacts] = {}
        self._block_sums: dict[str, str] = {}

    def add(
        self, piece: Piece, path: str, bindings: Mapping[str, str], sources: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        """Append a piece under the node path ``path``.

        Args:
            bindings: names in the graph of the piece's inputs and outputs; an unnamed one keeps its name.
            sources: the checkpoint tensors of each of the piece's parameters.
        """
        nodes, sources = stack_gate_and_up(piece.nodes, sources or {})
        names = {name: bindings.get(name, name) for name in (*piece.inputs, *piece.outputs)}
        for constant in piece.constants:
            names[constant.name] = self._constant(constant)
        for number, template in enumerate(nodes):
            node = onnx.NodeProto()
            node.CopyFrom(template)
            del node.metadata_props[:]
            parameters = [name for name in template.input if name in sources]
            owner = _module_path(sources[parameters[0]]) if parameters else f"{path}{_scope(template)}"
            node.name = f"{owner}/{template.op_type}_{number}"
            _rename(node, path, names, kept=sources)
            if template.op_type == "Gemm" and parameters:
                self._product(node, [sources[name] for name in parameters])
                continue
            for i, name in enumerate(node.input):
                if name in sources:
                    node.input[i] = self._vector(sources[name])
            self.nodes.append(node)

    def embed(self, ids: str, output: str) -> None:
        """Append the embedding lookup: ids [T] int64 -> output [T, hidden] float32."""
        table = self.binder.embedding()
        path, name = "/model/embed_tokens", EMBEDDING
        if table.scales is not None:
            rows = self._initializer(f"{name}.rows", table.data, (table.rows, table.columns))
            scales = self._initializer(f"{name}.row_scales", table.scales)
            piece = look_up(BLOCK, table.columns)
            self.add(piece, path, {"ids": ids, "rows": rows, "scales": scales, "values": output})
            return
        data = self._initializer(f"{name}.{table.kind}", table.data)
        if table.kind == "fp16":
            self._append("Gather", [data, ids], f"{path}/half", path)
            self._append("Cast", [f"{path}/half"], output, path, to=TensorProto.FLOAT)
        else:
            self._append("Gather", [data, ids], output, path)

    def gather(self, rows: str, chosen: str, output: str, path: str) -> None:
        """Append the choice of rows [T, ...] by number."""
        self._append("Gather", [rows, chosen], output, f"{path}/{output}")

    def save(self, spec: GraphSpec, path: Path) -> None:
        """Write the graph with the inputs and outputs of ``spec``."""
        graph = helper.make_graph(
            self.nodes,
            spec.name,
            [_value(tensor.name, tensor.dtype, tensor.shape) for tensor in spec.inputs],
            [_value(tensor.name, tensor.dtype, tensor.shape) for tensor in spec.outputs],
            initializer=list(self.initializers.values()),
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="edgekv",
            producer_version=edgekv.__version__,
        )
        path.write_bytes(model.SerializeToString())

    def _product(self, node: onnx.NodeProto, sources: list[tuple[str, ...]]) -> None:
        """Append the product with the matrices of ``sources``, one below the other; where kinds differ, several."""
        x, output, path = node.input[0], node.output[0], node.name.rpartition("/")[0]
        numbers = itertools.groupby(range(len(sources[0])), lambda number: self.binder.kinds.of(sources[0][number]))
        runs = [(run[0], run[-1] + 1) for _, group in numbers if (run := list(group))]
        if len(runs) == 1:
            self._multiply(x, sources, output, path)
            return
        outputs = [f"{output}_{first}" for first, _ in runs]
        for (first, end), part in zip(runs, outputs, strict=True):
            self._multiply(x, [names[first:end] for names in sources], part, f"{path}/{first}")
        self._append("Concat", outputs, output, path, axis=-1)

    def _multiply(self, x: str, sources: list[tuple[str, ...]], output: str, path: str) -> None:
        """Append the product of x with matrices of one kind, and their biases if there are any."""
        matrix = self.binder.matrix(sources[0])
        facts = self.matrices.setdefault(matrix.kind, {"weights": 0, "bytes": 0})
        facts["weights"] += matrix.rows * matrix.columns
        facts["bytes"] += matrix.size_bytes
        bias = [self._vector(sources[1])] if len(sources) > 1 else []
        name = sources[0][0] + (f"+{len(sources[0]) - 1}" * (len(sources[0]) > 1))
        data = self._initializer(f"{name}.{matrix.kind}", matrix.data)
        if matrix.scales is None:
            if matrix.kind == "fp16":
                self._append("Cast", [data], f"{name}.float", path, to=TensorProto.FLOAT)
                data = f"{name}.float"
            self._append("Gemm", [x, data, *bias], output, path, transB=1)
            return
        inputs = [x, data, self._initializer(f"{name}.scales", matrix.scales)]
        shape = {"K": matrix.columns, "N": matrix.rows, "bits": BITS[matrix.kind], "block_size": BLOCK}
        if matrix.zeros is not None:
            inputs.append(self._initializer(f"{name}.zeros", matrix.zeros))
        if bias:  # the inputs between are the zero points and g_idx
            inputs += [""] * (5 - len(inputs)) + bias
        of_codes = output if matrix.offsets is None else f"{output}_of_codes"
        self._append("MatMulNBits", inputs, of_codes, path, domain=CONTRIB, accuracy_level=ACCURACY_INT8, **shape)
        if matrix.offsets is not None:
            offsets = self._initializer(f"{name}.offsets", matrix.offsets)
            self._append("Gemm", [self._sums(x, path), offsets, of_codes], output, path, transB=1)

    def _sums(self, x: str, path: str) -> str:
        """Return the sums over the blocks of x [T, columns], [T, blocks]: what a value that a block adds to all meets."""
        if x not in self._block_sums:
            g = Nodes(f"{path}/")
            sums = g("ReduceSum", g("Reshape", x, g.ints(0, -1, BLOCK)), g.ints(2), keepdims=0)
            self.initializers |= g.constants
            self.nodes += g.nodes
            self._block_sums[x] = sums
        return self._block_sums[x]

    def _append(self, op_type: str, inputs: list[str], output: str, path: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=f"{path}/{op_type}", **attributes))

    def _vector(self, sources: tuple[str, ...]) -> str:
        return self._initializer("+".join(sources), self.binder.vector(sources))

    def _initializer(self, name: str, extent: Extent, shape: tuple[int, ...] | None = None) -> str:
        if name not in self.initializers:
            self.initializers[name] = self.binder.file.tensor(name, extent, shape)
        return name

    def _constant(self, constant: TensorProto) -> str:
        """Add a small constant under a name made of its value, so that equal ones are one."""
        array = onnx.numpy_helper.to_array(constant)
        name = f"constant_{array.dtype}_{json.dumps(array.tolist())}".replace(" ", "")
        if len(name) > 80:
            name = f"constant_{array.dtype}_{constant.name}"
        if name not in self.initializers:
            self.initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name


def segment_sources(checkpoint: Checkpoint, index: int, piece: Piece) -> dict[str, tuple[str, ...]]:
    """Return the checkpoint tensors behind each parameter of segment ``index``."""
    return {name: parameter_sources(checkpoint, index, name) for name in piece.parameters}


def _rename(node: onnx.NodeProto, path: str, names: dict[str, str], kept: Container[str] = ()) -> None:
    """Give the values of a node, and of the graphs in it, their names in the whole graph."""
    for values in (node.input, node.output):
        for i, name in enumerate(values):
            if name and name not in kept:
                values[i] = names.setdefault(name, f"{path}/{name}")
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                inner.name = f"{path}/{inner.name}"
                _rename(inner, path, names)
            for value in (*attribute.g.input, *attribute.g.output):
                value.name = names[value.name]


def _scope(node: onnx.NodeProto) -> str:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "[]")
    names = [part.strip("'\" ") for part in scopes.strip("[]").split(",")]
    modules = [name for name in names[:-1] if name]
    return "/" + modules[-1].replace(".", "/") if modules else ""


def _module_path(sources: tuple[str, ...]) -> str:
    """Turn model.layers.0.self_attn.o_proj.weight into /model/layers.0/self_attn/o_proj."""
    if sources == (EMBEDDING,):
        return "/lm_head"  # a product with the embedding is a tied head
    name = sources[0].rpartition(".")[0]
    if len(sources) > 1:
        name = name.replace("q_proj", "qkv_proj").replace("gate_proj", "gate_up_proj")
    return "/" + re.sub(r"\.(?!\d)", "/", name)


_KINDS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


def _value(name: str, dtype: str, shape: tuple[int | str, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _KINDS[dtype], list(shape))
