"""Quantised GGUF files without a second rounding: the bundle's matrices are the file's, bit for bit where blocks allow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from gguf import GGMLQuantizationType
from onnx import numpy_helper
from typer.testing import CliRunner

from edgekv.bundle import read_manifest
from edgekv.cli.main import app
from edgekv.errors import UsageError
from edgekv.export import export_model
from edgekv.export.checkpoint import EMBEDDING, Checkpoint
from edgekv.export.codes import Codes, StoredCodes
from edgekv.export.gguf.checkpoint import open_gguf
from edgekv.export.gguf.codes import code_bits
from edgekv.export.weight_files import Stored
from tests.checkpoints import make_checkpoint

from .driver import Float, InlineDriver, SplitDriver, embedding_rows
from .gguf_files import convert
from .test_weights import distance, prompt

Kind = GGMLQuantizationType
#: Types whose codes blocks of 32 hold, by the kind of matrix that they become.
EXACT = {"Q4_0": "int4", "Q4_1": "int4", "Q4_K": "int4", "Q5_0": "int8", "Q8_0": "int8"}
NEAREST = ("Q5_1", "Q5_K", "Q6_K", "Q3_K", "Q2_K")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("hf"),
        hidden_size=256,
        head_dim=64,
        num_hidden_layers=2,
        tie_word_embeddings=request.param,
    )


def matrices(folder: Path) -> Iterator[tuple[str, Float]]:
    """Every matrix that the graphs of a bundle multiply with by codes, under the name of its first tensor."""
    for name in read_manifest(folder).graphs:
        graph = onnx.load(folder / name).graph
        values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type != "MatMulNBits":
                continue
            shape = {attribute.name: attribute.i for attribute in node.attribute}
            rows, blocks, middle = shape["N"], shape["K"] // 32, 2 ** (shape["bits"] - 1)
            codes, scales = values[node.input[1]], values[node.input[2]]
            zeros = values[node.input[3]] if len(node.input) > 3 and node.input[3] else None
            if shape["bits"] == 4:
                codes = np.stack([codes & 15, codes >> 4], -1)
                zeros = zeros if zeros is None else np.stack([zeros & 15, zeros >> 4], -1).reshape(rows, -1)[:, :blocks]
            found = codes.reshape(rows, blocks, 32).astype(np.float32)
            found -= middle if zeros is None else zeros[..., None].astype(np.float32)
            found *= scales[..., None]
            added = [
                values[other.input[1]]
                for other in graph.node
                if other.op_type == "Gemm" and node.output[0] in other.input
            ]
            for offsets in added:
                found += offsets[..., None]
            base, _, more = node.input[1].rpartition(".int")[0].partition("+")
            yield base + more and base, found.reshape(rows, -1)


def whole(checkpoint: Checkpoint, name: str, rows: int) -> Float:
    """The tensors of one product, one below the other, from the first one's name on."""
    order = (
        ("q_proj", "k_proj", "v_proj") if "_attn.q_proj" in name or "_attn.v_proj" in name else ("gate_proj", "up_proj")
    )
    first = next((number for number, part in enumerate(order) if part in name), None)
    names = [name] if first is None else [name.replace(order[first], part) for part in order[first:]]
    return np.concatenate([checkpoint.tensor(each).numpy() for each in names])[:rows]


@pytest.mark.parametrize("kind", EXACT)
def test_codes_that_blocks_of_32_hold_are_taken_over_bit_for_bit(tmp_path: Path, source: Path, kind: str) -> None:
    path = convert(source, tmp_path / "m.gguf", "llama", GGMLQuantizationType[kind])
    manifest = export_model(path, tmp_path / "b")
    assert (manifest.engine, manifest.weights, manifest.source_codes) == ("onnx", EXACT[kind], "kept")
    checkpoint = open_gguf(path)
    found = dict(matrices(tmp_path / "b"))
    assert len(found) == 4 * 2 + 1  # qkv, o, gate and up, down of each layer; the head
    for name, values in found.items():
        np.testing.assert_array_equal(values, whole(checkpoint, name, len(values)), err_msg=name)
    assert manifest.embedding is not None
    model, ids = manifest.model, np.array(prompt(40))
    rows = embedding_rows(tmp_path / "b", manifest.embedding, model.vocab_size, model.hidden_size, ids)
    expected = checkpoint.tensor(EMBEDDING).numpy()[ids]
    if kind in ("Q4_1", "Q4_K"):  # rows have no offsets
        assert distance(rows, expected) < 0.01
    else:
        np.testing.assert_array_equal(rows, expected)
    assert (manifest.embedding.apart is False) is (model.tied_embeddings and EXACT[kind] == "int8")


def test_the_page_has_every_type_of_whose_codes_nothing_is_lost() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| Q") and "exactly" in line]
    assert {kind for row in rows for kind in row.split("|")[1].replace(",", " ").split()} == set(EXACT)
    assert {kind.name for kind in Kind if code_bits(kind.name) is not None} == set(EXACT)


@pytest.mark.parametrize("kind", NEAREST)
def test_other_codes_are_rounded_to_eight_bits(tmp_path: Path, source: Path, kind: str) -> None:
    path = convert(source, tmp_path / "m.gguf", "llama", GGMLQuantizationType[kind])
    manifest = export_model(path, tmp_path / "b")
    assert (manifest.weights, manifest.source_codes) == ("int8", "kept")
    checkpoint = open_gguf(path)
    for name, values in matrices(tmp_path / "b"):
        expected = whole(checkpoint, name, len(values))
        step = np.abs(expected.reshape(len(expected), -1, 32)).max(2).repeat(32, 1) / 127
        assert np.all(np.abs(values - expected) <= 1.01 * step), name


@pytest.mark.parametrize("form", ["split", "inline"])
def test_a_file_of_several_types_gives_the_logits_of_its_values(tmp_path: Path, source: Path, form: str) -> None:
    others = {
        "token_embd.weight": Kind.Q6_K, "output.weight": Kind.F16, "blk.0.attn_v.weight": Kind.Q8_0,
        "blk.1.attn_v.weight": Kind.Q4_1, "blk.1.ffn_up.weight": Kind.Q4_1, "blk.1.ffn_down.weight": Kind.Q4_1,
    }  # fmt: skip
    path = convert(source, tmp_path / "m.gguf", "llama", Kind.Q4_0, others)
    manifest = export_model(path, tmp_path / "b", form=form)
    export_model(path, tmp_path / "float", engine="onnx", weights="fp32")
    driver = SplitDriver(tmp_path / "b") if form == "split" else InlineDriver(tmp_path / "b")
    reference = SplitDriver(tmp_path / "float").step(prompt(40))
    assert distance(driver.step(prompt(40)), reference) < 0.03
    assert {"int4", "int8"} == {kind for graph in manifest.matrices.values() for kind in graph}
    assert manifest.least_onnxruntime == "1.22"


def test_what_is_asked_for_is_rounded_anew_and_said(tmp_path: Path, source: Path) -> None:
    path = convert(source, tmp_path / "m.gguf", "llama", Kind.Q8_0)

    def export(*options: str) -> str:
        done = CliRunner().invoke(app, ["export", str(path), "--out", str(tmp_path / "b"), "--force", *options])
        assert done.exit_code == 0, done.output
        return done.output

    assert "weights int8 as m.gguf has them (--weights decides)" in export()
    assert "(arm64, dotprod): onnx, which computes with weights as they are" in export("--target", "raspberry-pi-5-8gb")
    assert read_manifest(tmp_path / "b").made_for == "arm64, dotprod"
    said = export("--weights", "int4", "--engine", "onnx", "--calibration", "none")
    assert "m.gguf is quantised, and its weights were rounded anew; --engine onnx --weights stored keeps them" in said
    assert read_manifest(tmp_path / "b").source_codes == "rounded"


def test_codes_that_cannot_be_kept_are_refused_when_asked_for(tmp_path: Path, source: Path) -> None:
    path = convert(source, tmp_path / "m.gguf", "llama", Kind.Q8_0)
    with pytest.raises(UsageError, match="--weights stored is for --engine onnx"):
        export_model(path, tmp_path / "b", weights="stored", engine="executorch")
    with pytest.raises(UsageError, match="--weights stored is for --engine onnx"):
        export_model(path, tmp_path / "b", weights="stored", operators="xnnpack")
    with pytest.raises(UsageError, match="--weights stored keeps them"):
        export_model(path, tmp_path / "b", weights="stored", calibration=path)
    with pytest.raises(UsageError, match="holds floats, and --weights stored is for what is quantised"):
        export_model(source, tmp_path / "b", weights="stored")
    floats = convert(source, tmp_path / "f.gguf", "llama", Kind.F16)
    assert export_model(floats, tmp_path / "b", engine="onnx").source_codes is None


def test_codes_follow_the_rows_and_the_scales_of_their_tensor(tmp_path: Path) -> None:
    chance = torch.Generator().manual_seed(0)
    codes = Codes(
        torch.randint(0, 16, (6, 64), generator=chance, dtype=torch.uint8),
        torch.rand(6, 2, generator=chance),
        torch.full((6, 2), 8, dtype=torch.uint8),
    )
    stored = Stored(tmp_path, "w", (6, 64), "Q4_0", lambda: codes.values(64), StoredCodes(4, lambda: codes))
    turned = stored.rearranged(lambda rows: rows.flip(0)[:4], (4, 64))
    assert turned.codes is not None
    assert torch.equal(turned.read(), stored.read().flip(0)[:4])
    assert torch.equal(turned.codes.read().values(64), turned.read())
    torch.testing.assert_close(codes.scaled(0.3).values(64), codes.values(64) * 0.3)
    assert torch.equal(codes.in_eight_bits().values(64), codes.values(64))
