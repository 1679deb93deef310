"""Who chooses how tokens are chosen: an option, the makers of the model, nobody; and the run says who it was."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekv.bundle import SamplingSpec, read_manifest
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.sampling import SamplingOptions
from tests.conftest import Once

Bundle = Callable[..., Path]
SAID = {"do_sample": True, "temperature": 0.9, "top_k": 30}


@pytest.fixture
def sampled(once: Once, bundle: Bundle, checkpoint: Callable[[str], Path]) -> Path:
    """A bundle of a chat model whose makers sample."""

    def make(folder: Path) -> None:
        shutil.copytree(checkpoint("llama"), folder)
        (folder / "generation_config.json").write_text(json.dumps({**SAID, "eos_token_id": 257}), encoding="utf-8")

    return bundle(once("llama-sampled", make))


def run(bundle: Path, *options: str, said: str | None = None) -> dict[str, Any]:
    command = [sys.executable, "-m", "edgekv", "run", str(bundle), "-n", "8", "--json", *options]
    answer: dict[str, Any] = json.loads(
        subprocess.run(command, input=said, capture_output=True, text=True, check=True).stdout
    )
    return answer


def test_the_manifest_keeps_how_the_makers_of_the_model_sample(sampled: Path, bundle: Bundle) -> None:
    assert read_manifest(sampled).sampling == SamplingSpec(0.9, 30, 1.0, 1.0)
    assert read_manifest(bundle("demo")).sampling is None
    shown = subprocess.run(
        [sys.executable, "-m", "edgekv", "inspect", str(sampled)], capture_output=True, text=True, check=True
    ).stdout
    assert "temperature 0.9, top-k 30, where it chats" in shown


def test_a_conversation_is_sampled_as_the_makers_say_unless_an_option_says_otherwise(sampled: Path) -> None:
    plain = run(sampled, "--chat", said="Hello\n")
    assert plain["sampling"] == {
        "temperature": 0.9, "top_k": 30, "top_p": 1.0, "repetition_penalty": 1.0,
        "from": dict.fromkeys(("temperature", "top_k", "top_p", "repetition_penalty"), "model"),
    }  # fmt: skip
    assert plain["seed"] is not None
    again = run(sampled, "--chat", "--seed", str(plain["seed"]), said="Hello\n")
    assert again["text"] == plain["text"]
    greedy = run(sampled, "--chat", "-t", "0", said="Hello\n")
    assert greedy["seed"] is None
    assert (greedy["sampling"]["from"]["temperature"], greedy["sampling"]["from"]["top_k"]) == ("option", "model")
    assert greedy["text"] == run(sampled, "--chat", "-t", "0", said="Hello\n")["text"]


def test_the_summary_says_which_sampling_was_in_force_and_whose_it_is(sampled: Path, bundle: Bundle) -> None:
    def summary(folder: Path, *options: str) -> str:
        command = [sys.executable, "-m", "edgekv", "run", str(folder), "--chat", "-n", "2", *options]
        return subprocess.run(command, input="Hello\n", capture_output=True, text=True, check=True).stderr

    assert "temperature 0.9, top-k 30 (the model's own), seed " in summary(sampled)
    assert "temperature 0.5, top-k 30 (the model's own; temperature as the options say)" in summary(
        sampled, "-t", "0.5"
    )
    assert "sampling         greedy\n" in summary(bundle("demo"))


def test_a_conversation_in_python_is_sampled_as_the_makers_say_too(sampled: Path) -> None:
    asked = [{"role": "user", "content": "Hello"}]
    with Generator.open(sampled, RunOptions(context=256)) as generator:
        texts = {generator.chat(asked, max_tokens=12).text for _ in range(6)}
        assert len(texts) > 1
        assert generator.stats.seed is not None
        greedy = {generator.chat(asked, max_tokens=12, sampling=SamplingOptions()).text for _ in range(2)}
        assert len(greedy) == 1
