"""Matrices of a bundle in kinds of their own: in one product where the kinds agree, and told in the manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

from edgekv.bundle import Manifest, bits, read_manifest
from edgekv.cli.main import app
from edgekv.errors import UsageError
from edgekv.export import bundle_writer, export_model
from edgekv.export.checkpoint import open_checkpoint
from edgekv.export.matrix_kinds import MatrixKinds
from edgekv.runtime.engines.onnx.options import our_products
from tests.export.driver import InlineDriver, SplitDriver

from .test_weights import Bundle, distance, prompt

LAYER = "model.layers.0."
OTHERS = {
    f"{LAYER}self_attn.v_proj.weight": "int8",
    f"{LAYER}mlp.up_proj.weight": "int8",
    f"{LAYER}mlp.down_proj.weight": "fp16",
    "model.layers.1.self_attn.o_proj.weight": "fp32",
}


def mixed(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, form: str, head: str) -> Manifest:
    others = {**OTHERS, open_checkpoint(source).head: head}
    with monkeypatch.context() as patch:  # no bundle that other tests share is made so
        patch.setattr(bundle_writer, "choose_kinds", lambda checkpoint, weights: MatrixKinds(weights, others))
        return export_model(source, out, engine="onnx", form=form, weights="int8", calibration=None)


@pytest.mark.parametrize(("form", "head"), [("split", "int8"), ("split", "int4"), ("inline", "int8")])
def test_each_matrix_has_its_own_kind_and_the_logits_stay_close(
    form: str,
    head: str,
    checkpoint: Callable[[str], Path],
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = checkpoint("llama-tied")
    manifest = mixed(source, tmp_path / "b", monkeypatch, form, head)
    reference = SplitDriver(bundle(source)).step(prompt(48))
    driver = SplitDriver(tmp_path / "b") if form == "split" else InlineDriver(tmp_path / "b")
    assert distance(driver.step(prompt(48)), reference) <= (0.05 if head == "int8" else 0.2)
    model = manifest.model
    kinds = manifest.matrices_by_kind()
    assert kinds["fp16"] == {"weights": (wide := model.hidden_size * model.intermediate_size), "bytes": 2 * wide}
    assert kinds["fp32"]["bytes"] == 4 * kinds["fp32"]["weights"]
    table = model.vocab_size * model.hidden_size
    assert sum(facts["weights"] for facts in kinds.values()) == open_checkpoint(source).parameters - sum(
        stored.shape[0] for stored in open_checkpoint(source).location.values() if len(stored.shape) == 1
    )
    if form == "split":
        assert manifest.embedding is not None
        assert manifest.embedding.apart is (head == "int4")
        size = sum(facts["bytes"] for facts in manifest.files.values())
        assert size - manifest.weights_bytes() == (table * 9 // 8 if head == "int4" else 0)


def test_what_reads_one_input_is_one_product_for_each_run_of_equal_kinds(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def products(graph: str) -> list[str]:
        nodes = onnx.load(tmp_path / "b" / graph, load_external_data=False).graph.node
        return [node.name for node in nodes if node.op_type in ("MatMulNBits", "Gemm")]

    others = {f"{LAYER}self_attn.v_proj.weight": "int4"}
    monkeypatch.setattr(bundle_writer, "choose_kinds", lambda checkpoint, weights: MatrixKinds(weights, others))
    manifest = export_model(checkpoint("llama"), tmp_path / "b", engine="onnx", weights="int8")
    assert len(products("segment_0.onnx")) == 2
    assert len(products("segment_1.onnx")) == 4  # o, gate and up, down, qkv
    assert manifest.kinds("segment_0.onnx") == {"int4", "int8"}
    assert manifest.kinds("segment_1.onnx") == {"int8"}
    assert read_manifest(tmp_path / "b") == manifest


def test_our_kernels_run_graphs_whose_integers_all_have_four_bits() -> None:
    assert our_products({"int4"})
    assert our_products({"int4", "fp16"})
    assert not our_products({"int4", "int8"})
    assert not our_products({"fp32"})


def test_executorch_names_the_matrix_that_it_cannot_hold(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("executorch")
    monkeypatch.setattr(bundle_writer, "choose_kinds", lambda checkpoint, weights: MatrixKinds(weights, OTHERS))
    with pytest.raises(UsageError, match=r"self_attn.v_proj.weight is to be int8 among int4; use --engine onnx"):
        export_model(checkpoint("llama"), tmp_path / "b", engine="executorch", weights="int4", calibration="none")


def test_inspect_adds_up_the_bits_of_all_matrices(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed(checkpoint("llama-tied"), tmp_path / "b", monkeypatch, "split", "int4")
    said = CliRunner().invoke(app, ["inspect", str(tmp_path / "b")]).output
    (line,) = [line for line in said.splitlines() if line.startswith("matrices")]
    parts = read_manifest(tmp_path / "b").matrices_by_kind()
    assert all(f"in {kind} ({bits(facts):.2f} bits)" in line for kind, facts in parts.items())
    assert line.endswith(f": {bits(*parts.values()):.2f} bits a weight")
    assert (bits(parts["int8"]), bits(parts["fp16"]), bits(parts["fp32"])) == (9, 16, 32)
