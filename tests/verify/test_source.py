"""A bundle against the checkpoint that it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekv.errors import UsageError
from edgekv.export.checkpoint import open_checkpoint
from edgekv.export.walk import SourceRun
from edgekv.runtime.generate import RunOptions
from edgekv.tiers import KVMode
from edgekv.verify.gate import load_gate
from edgekv.verify.judge import Settings
from edgekv.verify.source import verify_source
from tests.checkpoints import load_reference
from tests.test_cli import here, refused

Bundle = Callable[..., Path]
FEW = Settings(tokens=200, decode=40)
GATE = load_gate("weights")


@pytest.mark.parametrize("variant", ["qwen3-qk-norm", "mistral-window"])
def test_a_checkpoint_reads_a_text_as_transformers_does(
    variant: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekv.export.walk._QUERIES", 48)  # in several parts, as long texts are
    source, tokens = checkpoint(variant), np.random.default_rng(0).integers(0, 250, 150).tolist()
    done: list[tuple[int, int]] = []
    run = SourceRun(open_checkpoint(source), tokens, lambda *step: done.append(step))
    with torch.no_grad():
        expected = load_reference(source)(torch.tensor([tokens])).logits[0].numpy()
    found = np.concatenate([run.logits(0, 64), run.logits(64, 150)])
    assert np.abs(found - expected).max() <= 1e-3
    assert done[-1][0] == done[-1][1]


def test_float_weights_and_an_fp16_cache_are_the_checkpoint(bundle: Bundle) -> None:
    verdict = verify_source(bundle("demo"), "demo", RunOptions(threads=2, kv=KVMode.FP16), GATE, FEW)
    assert verdict.passed
    assert abs(verdict.all.perplexity_change) < 1e-3
    assert verdict.all.max_kld < 1e-3
    assert (verdict.all.tokens, verdict.decode.tokens) == (200, 40)


@pytest.mark.slow
def test_int4_weights_rounded_to_the_nearest_code_fail_the_gate(bundle: Bundle) -> None:
    verdict = verify_source(bundle("demo", "split", "int4"), "demo", RunOptions(threads=2), GATE, Settings(tokens=1500))
    assert not verdict.passed
    assert verdict.all.perplexity_change > 0.02
    assert verdict.bundle["weights"] == "int4"


def test_another_checkpoint_and_another_kind_of_gate_are_refused(
    bundle: Bundle, checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(UsageError, match=r"was not made from .* of another length; give --reference what was exported"):
        verify_source(bundle("demo"), checkpoint("llama"), RunOptions(threads=2), GATE, FEW)
    with pytest.raises(UsageError, match="the gate 'standard' asks for identical bits or for right answers"):
        verify_source(bundle("demo"), "demo", RunOptions(threads=2), load_gate("standard"), FEW)


def test_the_command_compares_with_the_checkpoint(bundle: Bundle, tmp_path: Path) -> None:
    command = ("verify", bundle("demo"), "--reference", "demo", "--tokens", "200")
    result = here(*command)
    assert result.returncode == 0, result.stderr
    assert "checkpoint, float32" in result.stdout
    assert "compared with the checkpoint that was exported" in result.stdout
    data = json.loads(here(*command, "--kv", "int8", "--kv-budget", "70%", "--json").stdout)
    assert data["gate"] == "weights"
    assert data["text"]["tokens"] == 200
    assert abs(data["whole_text"]["perplexity_change"]) < 0.01
    refused(here(*command, "--html", tmp_path / "page.html"), 2, "--html", "--reference")
    refused(here(*command[:3], tmp_path / "gone"), 2, "gone", "is not a folder")


def test_an_export_that_is_checked_says_what_its_weights_cost_and_fails_where_that_is_too_much(
    tmp_path: Path, traces: None
) -> None:
    options = ("--engine", "onnx", "--weights", "int4", "--calibration", "none", "--check")
    poor = here("export", "demo", *options, "--out", tmp_path / "poor")
    assert poor.returncode == 1
    assert "check: perplexity +" in poor.stderr
    assert "against the checkpoint in float, mean KLD 0.0" in poor.stderr
    assert "the bundle is there, but the gate 'weights' failed" in poor.stderr
    assert (tmp_path / "poor" / "manifest.json").is_file()
