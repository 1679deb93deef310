"""Both forms give the logits and tokens of transformers, run with NumPy and ONNX Runtime alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from edgekv.errors import UsageError
from edgekv.export import export_model
from edgekv.model_config import ARCHITECTURES
from tests.cases import seldom
from tests.checkpoints import load_reference, make_checkpoint, make_image_reader
from tests.conftest import MODEL_TYPES, VARIANTS
from tests.export.driver import Float, InlineDriver, SplitDriver

TOLERANCE = 1e-3
#: Ways in which decoders differ that need no 64 tokens to show.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-some-windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 20}),
    "smollm3-unrotated-layer": ("smollm3", {"num_hidden_layers": 4}),
    "yarn-rope": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                                "original_max_position_embeddings": 256}}),
    "granite-tied": ("granite", {"tie_word_embeddings": True, "embedding_multiplier": 12.0, "residual_multiplier": 0.3}),
    "gemma3-tied": ("gemma3_text", {"tie_word_embeddings": True, "sliding_window": 20,
                                    "layer_types": ["full_attention"] + ["sliding_attention"] * 2}),
    "gemma3-bias": ("gemma3_text", {"attention_bias": True, "sliding_window_pattern": 2, "tie_word_embeddings": False}),
    "seed-oss": ("seed_oss", {"head_dim": 48, "attention_bias": True, "mlp_bias": True}),
    "one-layer": ("llama", {"num_hidden_layers": 1}),
}  # fmt: skip
#: Those of them that CI exports.
FURTHER = ("smollm3-unrotated-layer", "one-layer", "yarn-rope", "seed-oss")
#: Models that read images, by their type, with what their decoder's configuration says.
IMAGE_READERS: dict[str, dict[str, Any]] = {
    "gemma3": {},
    "mistral3": {"model_type": "mistral", "sliding_window": None},
}


def prompt(count: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(0).integers(0, 250, count).tolist()
    return tokens


def logits_of(model: PreTrainedModel, tokens: list[int]) -> Float:
    with torch.no_grad():
        rows: Float = model(torch.tensor([tokens])).logits[0].numpy()
    return rows


# Through the runtime test_generate.py takes those of conftest.ALWAYS in every run.
@pytest.mark.parametrize("variant", seldom([*VARIANTS, *MODEL_TYPES], but=("llama", "gemma3")))
def test_logits_and_64_greedy_tokens_equal_those_of_transformers(
    variant: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    source, given = checkpoint(variant), prompt(40)
    model = load_reference(source)
    inputs = torch.tensor([given])
    with torch.no_grad():
        expected = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=64, do_sample=False, eos_token_id=None
        )[0].tolist()
    reference = logits_of(model, expected)
    for driver_type, form in ((SplitDriver, "split"), (InlineDriver, "inline")):
        driver = driver_type(bundle(source, form))
        tokens, rows = list(given), [driver.step(given)]
        for _ in range(64):
            tokens.append(int(rows[-1][-1].argmax()))
            rows.append(driver.step(tokens[-1:]))
        assert tokens == expected, form
        assert np.abs(np.concatenate(rows) - reference).max() <= TOLERANCE, form
        driver = driver_type(bundle(source, form))
        chunks = [expected[:1], expected[1:8], expected[8:21], expected[21:40], expected[40:]]
        in_chunks = np.concatenate([driver.step(chunk) for chunk in chunks])
        assert in_chunks[39:-1].argmax(axis=1).tolist() == expected[40:], form
        assert np.abs(in_chunks - reference).max() <= TOLERANCE, form


@pytest.mark.parametrize(
    "variant",
    [
        *seldom(FURTHER, but=("smollm3-unrotated-layer",)),
        *seldom([name for name in MORE if name not in FURTHER], but=(), mark=pytest.mark.exhaustive),
    ],
)
def test_further_variants_give_the_logits_of_transformers(
    variant: str, tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    family, changes = MORE[variant]
    source = make_checkpoint(tmp_path, family, **changes)
    driver, tokens = SplitDriver(bundle(source)), prompt(60)
    rows = np.concatenate([driver.step(tokens[:31]), driver.step(tokens[31:59]), driver.step(tokens[59:])])
    assert np.abs(rows - logits_of(load_reference(source), tokens)).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("gemma3", "model.language_model."),
        ("gemma3", "language_model.model."),
        pytest.param("mistral3", "language_model.model.", marks=pytest.mark.slow),
    ],
)
def test_of_a_model_that_reads_images_the_part_that_writes_text_is_exported(
    kind: str, prefix: str, tmp_path: Path
) -> None:
    source, tokens = tmp_path / "source", prompt(40)
    model = make_image_reader(source, prefix, kind, **IMAGE_READERS[kind])
    export_model(source, tmp_path / "out", engine="onnx", weights="fp32")
    driver = SplitDriver(tmp_path / "out")
    assert driver.model.architecture == kind
    rows = np.concatenate([driver.step(tokens[:25]), driver.step(tokens[25:])])
    assert np.abs(rows - logits_of(model, tokens)).max() <= TOLERANCE


@pytest.mark.slow
def test_longrope_takes_the_factors_of_the_context_that_is_exported(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Texts longer than the original context: transformers turns all their tokens by the long factors."""
    source, tokens = tmp_path / "source", prompt(60)
    shutil.copytree(checkpoint("phi3"), source)
    config = json.loads((source / "config.json").read_text())
    for key in ("original_max_position_embeddings", "rope_parameters"):
        (config[key] if isinstance(config[key], dict) else config)["original_max_position_embeddings"] = 32
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="choose with --context 32 or --context 256"):
        export_model(source, tmp_path / "out", engine="onnx")
    model = load_reference(source)
    for context, count in ((32, 32), (256, 60)):
        export_model(source, tmp_path / "out", engine="onnx", weights="fp32", context=context, force=True)
        driver = SplitDriver(tmp_path / "out")
        assert driver.model.max_context == context
        rows = np.concatenate([driver.step(tokens[:20]), driver.step(tokens[20:count])])
        assert np.abs(rows - logits_of(model, tokens[:count])).max() <= TOLERANCE


def test_pages_in_int8_change_the_logits_little(checkpoint: Callable[[str], Path], bundle: Callable[..., Path]) -> None:
    source, tokens = checkpoint("llama"), prompt(100)
    driver = InlineDriver(bundle(source, "inline"), quantised=True)
    rows = np.concatenate([driver.step(tokens[:70]), driver.step(tokens[70:])])
    reference = logits_of(load_reference(source), tokens)
    assert np.abs(rows - reference).max() <= 0.05 * reference.std()
    assert all(mass.shape == (4,) and 0 < mass.sum() < 1 for mass in driver.page_mass)


@pytest.mark.slow
def test_partial_rotation_turns_only_the_first_channels_and_all_biases_count(
    tmp_path: Path, bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A further model type is a page of data: here a Llama that heeds partial_rotary_factor.

    transformers has no such one, so the oracle is a Llama with its channels put elsewhere and zero angles.
    """
    page = replace(ARCHITECTURES["llama"], partial_rotary=True)
    monkeypatch.setattr("edgekv.model_config.decoder.ARCHITECTURES", {"llama": page})
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    source = make_checkpoint(tmp_path, "llama", rope_parameters=rope, attention_bias=True, mlp_bias=True)
    tokens = prompt(40)
    model = load_reference(source)
    dim, half = 32, 8
    order = [*range(half), *range(2 * half, half + dim // 2), *range(half, 2 * half), *range(half + dim // 2, dim)]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.copy_(weight.unflatten(0, (-1, dim))[:, order].flatten(0, 1))
        frequencies = 1.0 / (10000.0 ** (torch.arange(0, 2 * half, 2) / (2 * half)))
        model.model.rotary_emb.inv_freq.zero_()[:half] = frequencies
    rows = SplitDriver(bundle(source)).step(tokens)
    assert np.abs(rows - logits_of(model, tokens)).max() <= TOLERANCE
