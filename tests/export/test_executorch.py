"""What is stored is what was lowered: each weight kind against its own eager reference, and the program's contents."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("executorch.exir", reason="the extra `executorch` is not installed")
pytest.importorskip("torchao", reason="the extra `executorch` is not installed")

from edgekv.bundle import EmbeddingSpec, read_manifest
from edgekv.contract import segment_spec
from edgekv.errors import EngineError, UsageError
from edgekv.export.checkpoint import EMBEDDING, HEAD, Checkpoint, open_checkpoint
from edgekv.export.decoder import build_segment, load_parameter
from edgekv.export.executorch import split as executorch
from edgekv.export.executorch.lower import quantise_linears
from edgekv.export.executorch.program import find_constant
from edgekv.export.executorch.split import HEAD_ROWS
from edgekv.export.executorch.weights import matrix_constants, quantise
from edgekv.export.matrix_kinds import MatrixKinds
from edgekv.runtime.decoder.embedding import Embedding
from edgekv.runtime.engines.executorch.blocks import plan_blocks
from edgekv.runtime.engines.executorch.library import CallList, load_library
from edgekv.runtime.generate import Generator, RunOptions, cache_home

#: Largest difference from the eager reference, relative to the largest value. int8 and int4 quantise activations as
#: they go, and an input that differs in the last bit can fall to the other side of a rounding.
TOLERANCE = {"fp32": 1e-5, "int8": 2e-2, "int4": 2e-2}


def eager(checkpoint: Checkpoint, index: int, weights: str, operators: str) -> torch.nn.Module:
    module = build_segment(checkpoint.config, index).to_empty(device="cpu").requires_grad_(False).eval()
    for name, parameter in module.named_parameters():
        parameter.data.copy_(load_parameter(checkpoint, index, name))
    quantise_linears(module, "segment", weights, operators)
    return module


@pytest.mark.parametrize(
    ("weights", "operators", "variant", "rows"),
    [
        pytest.param("int4", "xnnpack", "qwen3-qk-norm", 1, marks=pytest.mark.slow),
        pytest.param("int8", "xnnpack", "qwen3-qk-norm", 1, marks=pytest.mark.exhaustive),
        pytest.param("fp32", "xnnpack", "qwen3-qk-norm", 1, marks=pytest.mark.exhaustive),
        # test_engines.py takes this program through the runtime in every run.
        pytest.param("int4", "edgekv", "qwen3-qk-norm", 1, marks=pytest.mark.exhaustive),
        pytest.param("int4", "edgekv", "qwen2-bias", 40, marks=pytest.mark.slow),
        pytest.param("int4", "edgekv", "gemma3", 3, marks=pytest.mark.slow),
    ],
)
def test_every_segment_computes_what_its_eager_reference_does(
    weights: str,
    operators: str,
    variant: str,
    rows: int,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if operators == "edgekv":
        pytest.importorskip("edgekv.runtime._kernels", reason="the native extension is not built")
    source = open_checkpoint(checkpoint(variant))
    monkeypatch.setattr(executorch, "EXECUTORCH_ROWS", (rows,))
    monkeypatch.setattr(executorch, "EXECUTORCH_HEAD_ROWS", (rows,))
    steps: list[str] = []
    written = executorch.write_graphs(
        source, tmp_path, form="split", kinds=MatrixKinds(weights), page_size=16, calibration=None, step=steps.append,
        operators=operators,
    )  # fmt: skip
    embedding = written.embedding
    assert written.graphs == ("model.pte",)
    assert isinstance(embedding, EmbeddingSpec)
    assert len(steps) == executorch.count_steps(source)
    own = [] if source.config.model.tied_embeddings else ["embedding.bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*own, "model.pte"]
    if source.config.model.tied_embeddings:  # the rows are the head's own numbers
        table, tokens = source.tensor(EMBEDDING), np.array([0, 383, 97])
        stored = table if weights == "fp32" else quantise(table, weights).dequantise()
        found = np.zeros((3, table.shape[1]), np.float32)
        Embedding(tmp_path, embedding, source.config.model).look_up(tokens, found)
        np.testing.assert_array_equal(found, stored.numpy()[tokens])
    library = load_library(cache_home())
    if operators == "edgekv":
        library.set_operators(2)
    program = library.open(tmp_path / "model.pte", None)
    generator = torch.Generator().manual_seed(1)
    for index in range(source.config.model.n_layers + 1):
        spec = segment_spec(source.config.model, index)
        shapes = [[rows if dim == "T" else int(dim) for dim in tensor.shape] for tensor in spec.inputs]
        inputs = [torch.randn(shape, generator=generator) for shape in shapes]
        with torch.no_grad():
            result = eager(source, index, weights, operators)(*inputs)
        expected = [result] if isinstance(result, torch.Tensor) else list(result)
        outputs = [np.zeros(tuple(tensor.shape), np.float32) for tensor in expected]
        call = program.method(f"segment_{index}_t{rows}").bind(spec, [tensor.numpy() for tensor in inputs], outputs)
        CallList(library, [call]).run()
        for tensor, output in zip(expected, outputs, strict=True):
            scale = float(tensor.abs().max())
            assert np.abs(output - tensor.numpy()).max() <= TOLERANCE[weights] * scale, (index, weights)


@pytest.fixture(scope="module")
def pair(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A checkpoint whose head is its embedding, and one that holds the same matrix twice: by whether they are tied."""
    tied, untied = checkpoint("llama-tied"), tmp_path_factory.mktemp("untied")
    shutil.copytree(tied, untied, dirs_exist_ok=True)
    config = json.loads((tied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    tensors = load_file(tied / "model.safetensors")
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, untied / "model.safetensors")
    return {True: tied, False: untied}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "operators"),
    [
        ("int4", "edgekv"),
        pytest.param("int4", "xnnpack", marks=pytest.mark.exhaustive),  # four minutes of its compiler
        pytest.param("int8", None, marks=pytest.mark.exhaustive),
        pytest.param("fp32", None, marks=pytest.mark.exhaustive),
    ],
)
def test_a_tied_embedding_is_stored_once_and_an_untied_one_beside_the_head(
    weights: str, operators: str | None, pair: dict[bool, Path], bundle: Callable[..., Path]
) -> None:
    folders = {tied: bundle(pair[tied], weights=weights, engine="executorch", operators=operators) for tied in pair}
    spec, sizes = {}, {}
    for tied, folder in folders.items():
        manifest = read_manifest(folder)
        assert manifest.embedding is not None
        spec[tied] = manifest.embedding
        sizes[tied] = {name: facts["bytes"] for name, facts in manifest.files.items()}
    assert sizes[False].pop("embedding.bin") >= 384 * 128
    assert spec[False].file == "embedding.bin"
    assert (spec[True].file, spec[True].dtype) == ("model.pte", HEAD_ROWS[weights])
    assert sizes[True] == sizes[False]


@pytest.mark.slow
def test_one_matrix_stored_once_and_twice_give_the_same_text(
    pair: dict[bool, Path], bundle: Callable[..., Path]
) -> None:
    texts = []
    for source in pair.values():
        with Generator.open(bundle(source, engine="executorch"), RunOptions(threads=2)) as generator:
            texts.append(list(generator.tokens(list(range(40, 90)), max_tokens=40)))
    assert texts[0] == texts[1]


def test_a_head_that_is_not_in_the_program_as_a_whole_is_said(tmp_path: Path) -> None:
    (constant, *_) = matrix_constants(torch.ones(4, 32), "fp32")
    (tmp_path / "model.pte").write_bytes(constant.data[:-4] + b"1" + constant.data)
    assert find_constant(tmp_path / "model.pte", constant) == len(constant.data) - 3
    (tmp_path / "model.pte").write_bytes(constant.data[:-4])
    with pytest.raises(EngineError, match="stores weights in a way that edgekv does not know"):
        find_constant(tmp_path / "model.pte", constant)


def test_int4_scales_are_what_the_delegate_stores_and_clipping_is_a_gain() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    quantised = quantise(weight, "int4")
    assert quantised.scales.dtype == torch.bfloat16
    assert int(quantised.codes.min()) >= -8
    assert int(quantised.codes.max()) <= 7
    plain = (weight.reshape(64, 3, 32).abs().amax(2, keepdim=True) / 7).to(torch.bfloat16).float()
    rounded = (weight.reshape(64, 3, 32) / plain).round().clamp(-8, 7) * plain
    error = float((quantised.dequantise() - weight).square().mean())
    assert error < float((rounded.reshape(64, 96) - weight).square().mean())
    codes, scales = matrix_constants(weight, "int4")
    assert (len(codes.data), len(scales.data)) == (64 * 48, 64 * 3 * 2)
    assert scales.key.startswith("scale_")


def test_int4_needs_columns_in_groups_and_says_what_to_do() -> None:
    from edgekv.export.executorch.weights import check_columns

    with pytest.raises(UsageError, match=r"40 columns.*multiple of 32; use --weights int8"):
        check_columns("int4", 40, "segment_1.exit.down_proj")


def test_a_weight_that_the_lowering_changed_is_never_left_random() -> None:
    from types import SimpleNamespace

    from edgekv.export.executorch.program import ProgramBuilder

    named = SimpleNamespace(pte_data={}, buffers=[])
    program = SimpleNamespace(execution_plan=[], backend_delegate_data=[], constant_buffer=[])
    template = SimpleNamespace(executorch_program=program, _named_data=named)
    with pytest.raises(EngineError, match=r"changed weights on the way: middle/norm\.weight"):
        ProgramBuilder(template, {"middle/norm.weight": matrix_constants(torch.ones(1, 4), "fp32")}, Path("."))


def test_blocks_cover_every_number_of_tokens_in_order() -> None:
    for count in (*range(1, 300), 1000):
        blocks = plan_blocks(count)
        ends = [start + size for start, size in blocks]
        assert [start for start, _ in blocks] == [0, *ends[:-1]]
        assert ends[-1] >= count > ends[-1] - blocks[-1][1]
