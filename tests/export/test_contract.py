"""What an exported graph takes and gives is what edgekv.contract says, and so does the page in docs/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from edgekv.bundle import read_manifest
from edgekv.contract import IO, GraphSpec, TensorSpec, inline_spec, segment_spec
from edgekv.errors import UsageError
from edgekv.export import export_model
from edgekv.export.onnx.pieces import OPSET
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.tiers import KVMode
from tests.export.contract_page import PAGE, render

KINDS = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "int8": onnx.TensorProto.INT8,
    "int64": onnx.TensorProto.INT64,
    "bool": onnx.TensorProto.BOOL,
}


def declared(tensor: TensorSpec) -> tuple[str, int, tuple[int | str, ...]]:
    return tensor.name, KINDS[tensor.dtype], tensor.shape


def found(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[int | str, ...]]:
    kind = value.type.tensor_type
    return value.name, kind.elem_type, tuple(d.dim_param or d.dim_value for d in kind.shape.dim)


def check(path: Path, spec: GraphSpec) -> None:
    model = onnx.load(path, load_external_data=False)
    assert [found(value) for value in model.graph.input] == [declared(tensor) for tensor in spec.inputs]
    assert [found(value) for value in model.graph.output] == [declared(tensor) for tensor in spec.outputs]
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": OPSET, "com.microsoft": 1}


@pytest.mark.parametrize("variant", ["llama", "qwen3-qk-norm"])
def test_segments_keep_the_contract(
    variant: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    folder = bundle(checkpoint(variant), "split")
    manifest = read_manifest(folder)
    assert len(manifest.graphs) == manifest.model.n_layers + 1
    for index, name in enumerate(manifest.graphs):
        check(folder / name, segment_spec(manifest.model, index))


@pytest.mark.parametrize("variant", ["llama", "qwen3-qk-norm"])
def test_the_inline_graph_keeps_the_contract(
    variant: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    folder = bundle(checkpoint(variant), "inline")
    manifest = read_manifest(folder)
    check(folder / manifest.graphs[0], inline_spec(manifest.model, manifest.page_size))


def test_nodes_are_named_by_path_and_named_once(checkpoint: Callable[[str], Path], bundle: Callable[..., Path]) -> None:
    graph = onnx.load(bundle(checkpoint("llama"), "inline") / "model.onnx", load_external_data=False).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert "/model/layers.0/self_attn/o_proj/Gemm" in names


def test_the_page_in_docs_shows_the_tables_of_the_contract() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == render(page), "run: python -m tests.export.contract_page"


def test_a_portable_bundle_takes_no_float16_and_gives_the_same_tokens(tmp_path: Path) -> None:
    prompt, answers = list(range(2, 90)), []
    for io in IO:
        export_model("demo", tmp_path / io, form="inline", engine="onnx", io=io)
        graph = onnx.load(tmp_path / io / "model.onnx", load_external_data=False).graph
        kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
        assert KINDS["bool"] not in kinds
        assert (KINDS["float16"] in kinds) == (io == "compact")
        check(tmp_path / io / "model.onnx", read_manifest(tmp_path / io).inline_spec())
        with Generator.open(tmp_path / io, RunOptions(threads=2, kv=KVMode.INT8, prefixes=False)) as generator:
            answers.append(list(generator.tokens(prompt, max_tokens=24)))
    assert answers[0] == answers[1]


def test_types_of_the_cache_are_for_the_inline_form_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--io is for --form inline"):
        export_model("demo", tmp_path / "split", io="portable")
