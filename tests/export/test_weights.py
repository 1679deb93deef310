"""What each weight kind costs in bytes and in logits, and that nothing is stored twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgekv.bundle import read_manifest
from edgekv.export.checkpoint import open_checkpoint
from edgekv.export.onnx.matmul_nbits import quantise
from tests.cases import seldom
from tests.checkpoints import make_checkpoint
from tests.export.driver import Float, InlineDriver, SplitDriver, embedding_rows

Bundle = Callable[..., Path]
#: Root mean square of the logit error over that of the logits, on random weights, which forgive nothing. int8 and int4
#: include INT8 activations, whose rounding turns on the last bit: the two forms then differ a little.
TOLERANCE = {"fp16": 2e-3, "int8": 0.05, "int4": 0.5}
BETWEEN_FORMS = 0.02
#: Kullback-Leibler divergence per token from the float32 logits, on the bundled model and English text.
DIVERGENCE = {"fp16": 1e-6, "int8": 0.005, "int4": 0.1}
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife."


def prompt(count: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(1).integers(0, 250, count).tolist()
    return tokens


def distance(rows: Float, reference: Float) -> float:
    return float(np.sqrt(np.square(rows - reference).mean() / np.square(reference).mean()))


def log_softmax(rows: Float) -> NDArray[np.float64]:
    shifted = rows.astype(np.float64) - rows.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def extents(folder: Path) -> Iterator[tuple[int, int]]:
    """Every (offset, bytes) that a graph of the bundle reads from the weight file."""
    for name in read_manifest(folder).graphs:
        for tensor in onnx.load(folder / name, load_external_data=False).graph.initializer:
            fields = {entry.key: entry.value for entry in tensor.external_data}
            if fields:
                assert fields["location"] == "weights.bin"
                yield int(fields["offset"]), int(fields["length"])


@pytest.mark.parametrize(
    "variant", seldom(["llama", "llama-tied", "qwen2-bias"], but=["llama"], mark=pytest.mark.exhaustive)
)
@pytest.mark.parametrize("weights", seldom(TOLERANCE, but=("int4",)))
def test_smaller_weights_keep_the_logits_close_and_both_forms_alike(
    variant: str, weights: str, checkpoint: Callable[[str], Path], bundle: Bundle
) -> None:
    source, tokens = checkpoint(variant), prompt(48)
    reference = SplitDriver(bundle(source)).step(tokens)
    split = SplitDriver(bundle(source, "split", weights)).step(tokens)
    assert distance(split, reference) <= TOLERANCE[weights]
    inline = InlineDriver(bundle(source, "inline", weights)).step(tokens)
    assert distance(inline, split) <= BETWEEN_FORMS


@pytest.mark.parametrize("weights", DIVERGENCE)
def test_smaller_weights_keep_what_the_bundled_model_predicts(weights: str, bundle: Bundle) -> None:
    folder = bundle("demo", "split", weights)
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT * 3).ids
    expected, got = (log_softmax(SplitDriver(path).step(tokens)) for path in (bundle("demo"), folder))
    assert (np.exp(expected) * (expected - got)).sum(axis=1).mean() <= DIVERGENCE[weights]


@pytest.mark.parametrize("form", seldom(["split", "inline"], but=["split"]))
@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8", "int4"])
def test_a_tied_embedding_is_on_disk_once_but_beside_int4_where_its_rows_are_int8(
    form: str, weights: str, checkpoint: Callable[[str], Path], bundle: Bundle
) -> None:
    folder = bundle(checkpoint("llama-tied"), form, weights)
    model = read_manifest(folder).model
    weight_bits = {"fp32": 32.0, "fp16": 16.0, "int8": 9.0, "int4": 5.125}[weights]
    parameters = open_checkpoint(checkpoint("llama-tied")).parameters
    table = model.vocab_size * model.hidden_size
    assert parameters > table
    bytes_needed = (parameters * weight_bits + (table * 9 if weights == "int4" else 0)) / 8
    assert (folder / "weights.bin").stat().st_size <= bytes_needed * 1.02 + 32 * 4096


def test_the_embedding_of_the_manifest_is_the_head_when_tied(checkpoint: Callable[[str], Path], bundle: Bundle) -> None:
    for weights in ("fp32", "fp16", "int8", "int4"):
        folder = bundle(checkpoint("llama-tied"), "split", weights)
        embedding = read_manifest(folder).embedding
        assert embedding is not None
        assert (embedding.offset in {offset for offset, _ in extents(folder)}) is (weights != "int4")


def test_rows_that_are_read_one_by_one_count_nothing_in_memory(
    checkpoint: Callable[[str], Path], bundle: Bundle
) -> None:
    for weights, apart in (("fp32", False), ("fp16", False), ("int8", False), ("int4", True)):
        manifest = read_manifest(bundle(checkpoint("llama-tied"), "split", weights))
        table, model = manifest.embedding, manifest.model
        assert table is not None
        size = sum(facts["bytes"] for facts in manifest.files.values())
        rows = model.vocab_size * (model.hidden_size + model.hidden_size // 32 * 4)
        assert table.table_bytes(model.vocab_size, model.hidden_size) == (
            rows
            if weights in ("int8", "int4")
            else model.vocab_size * model.hidden_size * (4 if weights == "fp32" else 2)
        )
        assert manifest.weights_bytes() == size - (rows if apart else 0)


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8", "int4"])
def test_embedding_rows_are_those_of_the_checkpoint(
    weights: str, checkpoint: Callable[[str], Path], bundle: Bundle
) -> None:
    for variant in ("llama", "llama-tied"):
        folder, ids = bundle(checkpoint(variant), "split", weights), np.array(prompt(20))
        manifest = read_manifest(folder)
        assert manifest.embedding is not None
        rows = embedding_rows(folder, manifest.embedding, manifest.model.vocab_size, manifest.model.hidden_size, ids)
        table = open_checkpoint(checkpoint(variant)).tensor("model.embed_tokens.weight").numpy()
        assert distance(rows, table[ids]) <= {"float32": 0, "float16": 1e-3, "int8": 0.01}[manifest.embedding.dtype]


def test_large_tensors_can_be_mapped_and_no_two_overlap(checkpoint: Callable[[str], Path], bundle: Bundle) -> None:
    for form in ("split", "inline"):
        found = sorted(set(extents(bundle(checkpoint("llama"), form))))
        assert all(offset % (4096 if size >= 1 << 16 else 64) == 0 for offset, size in found)
        assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(found))


@pytest.mark.parametrize("weights", seldom(["int8", "int4"], but=["int4"]))
def test_widths_that_do_not_fill_their_blocks_are_padded(weights: str, tmp_path: Path, bundle: Bundle) -> None:
    source = make_checkpoint(
        tmp_path, hidden_size=80, intermediate_size=144, num_hidden_layers=1, tie_word_embeddings=True
    )
    tokens = prompt(30)
    reference = SplitDriver(bundle(source)).step(tokens)
    split = SplitDriver(bundle(source, "split", weights))
    assert split.manifest.embedding is not None
    assert split.manifest.embedding.dtype == "float16"
    rows = split.step(tokens)
    assert distance(rows, reference) <= TOLERANCE[weights]
    assert distance(InlineDriver(bundle(source, "inline", weights)).step(tokens), rows) <= BETWEEN_FORMS


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_codes_are_low_nibble_first(symmetric: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    got = quantise(weight, 4, symmetric=symmetric)
    codes = np.stack([got.codes & 15, got.codes >> 4], axis=-1).reshape(8, 2, 32).astype(np.float32)
    zeros = np.float32(8) if got.zeros is None else np.stack([got.zeros & 15, got.zeros >> 4], -1).reshape(8, 2, 1)
    restored = ((codes - zeros) * got.scales[:, :, None]).reshape(8, 64)
    assert np.abs(restored - weight).max() <= got.scales.max()
