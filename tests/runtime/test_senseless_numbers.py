"""Tokens that the vocabulary does not have, and logits that are no numbers: one line that names them, and nothing changed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgekv.errors import BundleError, EngineError, UsageError
from edgekv.export import export_model
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import verified_stamp
from edgekv.runtime.sampling import SamplingOptions
from tests.cases import seldom
from tests.checkpoints import make_checkpoint

Bundle = Callable[..., Path]
FORMS = ("split", "inline")
VOCAB = 384
#: The token whose logits overflow in the bundles below.
LOUD = 7
ENTRANCES: dict[str, Callable[[Generator, Any], object]] = {
    "stream": lambda generator, tokens: list(generator.stream(tokens, max_tokens=2)),
    "tokens": lambda generator, tokens: list(generator.tokens(tokens, max_tokens=2)),
    "prefill": lambda generator, tokens: generator.prefill(tokens, max_tokens=2),
    "step": lambda generator, tokens: generator.step(tokens),
    "score": lambda generator, tokens: generator.score(tokens),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> dict[str, Path]:
    source = make_checkpoint(tmp_path_factory.mktemp("plain"))
    return {form: bundle(source, form) for form in FORMS}


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> dict[str, Path]:
    """Bundles whose weights are all finite and whose logits after token 7 are not.

    Channel 0 is that token's own: no other has it, no layer writes it, and the head multiplies it with what overflows.
    """
    source = make_checkpoint(tmp_path_factory.mktemp("loud"))
    weights = load_file(source / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 0
    weights["model.embed_tokens.weight"][LOUD, 0] = 10
    weights["lm_head.weight"][:, 0] = 1e38
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[0] = 0
    save_file(weights, source / "model.safetensors")
    return {form: bundle(source, form) for form in FORMS}


@pytest.mark.parametrize("form", seldom(FORMS, but=("split",)))
@pytest.mark.parametrize(
    "wrong", [[3, VOCAB], [-1], [1.0], [2.7], [True], [None], ["a"], [10**30], np.array([0.5]), [[1], [2, 3]]]
)
def test_a_token_that_the_vocabulary_does_not_have_is_refused_at_every_entrance(
    plain: dict[str, Path], form: str, wrong: Any
) -> None:
    with Generator.open(plain[form], RunOptions(threads=1, context=64)) as generator:
        with pytest.raises(UsageError, match="call prefill"):
            generator.step([1])
        generator.prefill([1, 2, 3], max_tokens=8)
        after = generator.prefill([1, 2, 3], max_tokens=8).copy()
        for enter in ENTRANCES.values():
            with pytest.raises(UsageError) as caught:
                enter(generator, wrong)
            assert "token" in str(caught.value)
            assert "\n" not in str(caught.value)
        for name in ("step", "score"):
            with pytest.raises(UsageError, match="no token to add"):
                ENTRANCES[name](generator, [])
        assert np.array_equal(generator.prefill([1, 2, 3], max_tokens=8), after)


@pytest.mark.parametrize("form", seldom(FORMS, but=("split",)))
@pytest.mark.parametrize(
    "tokens", [[5, 6], (5, 6), np.array([5, 6], np.uint16), torch.tensor([5, 6]), [np.int32(5), 6]]
)
def test_tokens_in_any_sequence_of_whole_numbers_are_the_same_tokens(
    plain: dict[str, Path], form: str, tokens: Any
) -> None:
    with Generator.open(plain[form], RunOptions(threads=1, context=64)) as generator:
        assert list(generator.tokens(tokens, max_tokens=3)) == list(generator.tokens([5, 6], max_tokens=3))
        assert generator.score(tokens).shape == (2, VOCAB)


@pytest.mark.parametrize("form", seldom(FORMS, but=("split",)))
def test_logits_that_are_not_finite_stop_a_run_with_the_position_of_their_token(
    loud: dict[str, Path], form: str
) -> None:
    with Generator.open(loud[form], RunOptions(threads=1, context=64)) as generator:
        generator.prefill([1, 2, 3], max_tokens=8)
        fine = generator.prefill([1, 2, 3], max_tokens=8).copy()
        assert np.isfinite(fine).all()
        for sampling in (SamplingOptions(), SamplingOptions(temperature=0.8, seed=1)):
            with pytest.raises(EngineError, match="logits at token 3 are not finite"):
                list(generator.tokens([1, 2, 3, LOUD], max_tokens=8, sampling=sampling))
        generator.prefill([1, 2, 3], max_tokens=8)
        with pytest.raises(EngineError, match="logits at token 4 are not finite"):
            generator.score([4, LOUD, 5])
        assert np.array_equal(generator.prefill([1, 2, 3], max_tokens=8), fine)


def test_weights_that_were_spoiled_after_they_were_hashed_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "out.edgekv"
    export_model(make_checkpoint(tmp_path / "source"), folder, engine="onnx", weights="fp32")
    with Generator.open(folder, RunOptions(threads=1, context=64)) as generator:
        generator.prefill([1, 2, 3], max_tokens=1)
    weights = folder / "weights.bin"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    # Rotten bits change no time of a file.
    stamp = verified_stamp(folder)
    seen = json.loads(stamp.read_text())
    seen["weights.bin"][1] = weights.stat().st_mtime_ns
    stamp.write_text(json.dumps(seen))
    with (
        Generator.open(folder, RunOptions(threads=1, context=64)) as generator,
        pytest.raises(BundleError, match=r"weights\.bin differs from its sha256"),
    ):
        generator.prefill([1, 2, 3], max_tokens=1)


def test_the_command_line_says_so_in_one_line(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"].fill_(3e38)
    save_file(weights, source / "model.safetensors")
    export_model(source, tmp_path / "out.edgekv", engine="onnx", weights="fp32")
    command = [sys.executable, "-m", "edgekv", "run", str(tmp_path / "out.edgekv"), "--prompt", "pages", "-n", "4"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout.strip() == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("edgekv: ")]
    assert len(lines) == 1, result.stderr
    assert "are not finite" in lines[0]
