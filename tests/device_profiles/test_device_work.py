"""What a step reads and computes, against Hugging Face's own models and against counting one by one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv.device_profiles.geometry import Geometry
from edgekv.device_profiles.work import kv_bytes_per_token, kv_tokens, step_work, weights_bytes
from edgekv.errors import UsageError
from edgekv.spec import PageSpec

SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 500,
    "max_position_embeddings": 512,
}
LLAMA = Geometry.from_config({**SMALL, "model_type": "llama"})
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "tie_word_embeddings": False},
    "qwen2": {**SMALL, "tie_word_embeddings": True},
    "qwen3": {**SMALL, "head_dim": 32},
    "mistral": SMALL,
    "gemma2": {**SMALL, "head_dim": 32},
    "phi3": {**SMALL, "pad_token_id": 0},
    "gpt2": {"n_layer": 3, "n_embd": 64, "n_head": 4, "vocab_size": 500, "n_positions": 128},
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**SMALL, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "qwen3_next": {
        **SMALL,
        "num_hidden_layers": 4,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 40,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 8,
    },
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_geometry_counts_the_weights_that_hugging_face_builds(kind: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    matrices = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() > 1 and not {"wpe", "conv1d"} & set(name.split("."))
    )
    assert Geometry.from_config(config.to_dict()).parameters == matrices


@pytest.mark.parametrize("stated", ["full_attention_interval", "layer_types"])
def test_a_layer_of_linear_attention_has_a_state_and_no_cache(stated: str) -> None:
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    config = {**CONFIGS["qwen3_next"], "model_type": "qwen3_next", "full_attention_interval": 4, "layer_types": kinds}
    del config["full_attention_interval" if stated == "layer_types" else "layer_types"]
    model = Geometry.from_config(config)
    assert (model.n_layers, model.n_kv_layers, model.windows) == (4, 1, (0,))
    near, far = (
        step_work(model, n_tokens=1, context=context, bits_per_weight=8, kv_bytes_per_token=10) for context in (0, 1000)
    )
    state = 4 * 16 * 8 * 4  # value heads x key channels x value channels x float32
    assert near.kv_bytes == 3 * 2 * state
    assert far.kv_bytes - near.kv_bytes == 1000 * 10
    assert far.weight_bytes == near.weight_bytes


def test_a_configuration_nested_under_text_config_is_read() -> None:
    assert Geometry.from_config({"model_type": "gemma3", "text_config": {**SMALL, "model_type": "llama"}}) == LLAMA


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden_size": None}, "hidden_size is None"), ({"vocab_size": "many"}, "vocab_size is 'many'")],
)
def test_a_configuration_without_a_number_is_refused_by_its_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Geometry.from_config({**json.loads(json.dumps(SMALL)), **change})


def test_decode_reads_every_weight_but_the_embedding_row_by_row() -> None:
    work = step_work(LLAMA, n_tokens=1, context=0, bits_per_weight=8, kv_bytes_per_token=100)
    assert work.weight_bytes == LLAMA.parameters - LLAMA.head_weights  # untied: the embedding is not read
    assert work.ops == 2 * work.weight_bytes
    assert work.kv_bytes == 0


def test_a_chunk_without_logits_leaves_the_head_alone() -> None:
    with_head = step_work(LLAMA, n_tokens=16, context=0, bits_per_weight=8, kv_bytes_per_token=0)
    without = step_work(LLAMA, n_tokens=16, context=0, bits_per_weight=8, kv_bytes_per_token=0, logits=0)
    assert with_head.weight_bytes - without.weight_bytes == LLAMA.head_weights
    assert with_head.ops - without.ops == 2 * LLAMA.head_weights


def test_a_mixture_of_experts_reads_the_chosen_experts_and_a_chunk_reads_more_of_them() -> None:
    model = Geometry.from_config({"model_type": "mixtral", **CONFIGS["mixtral"]})
    reads = [
        step_work(model, n_tokens=n, context=0, bits_per_weight=8, kv_bytes_per_token=0).weight_bytes
        for n in (1, 2, 99)
    ]
    whole = model.parameters - model.head_weights
    assert reads[0] < reads[1] <= reads[2] == whole


def test_a_sliding_window_bounds_what_is_attended_to() -> None:
    model = Geometry.from_config({**SMALL, "model_type": "mistral", "sliding_window": 100})
    assert kv_tokens(model, 50) == 50
    assert kv_tokens(model, 5000) == 100
    mixed = Geometry.from_config({**SMALL, "model_type": "gemma2", "sliding_window": 100})
    assert kv_tokens(mixed, 1000) == (100 + 1000 + 100) / 3


@given(chunk=st.integers(1, 40), context=st.integers(0, 60))
def test_attention_operations_are_those_of_counting_every_pair(chunk: int, context: int) -> None:
    pairs = sum(context + i + 1 for i in range(chunk))
    counted = LLAMA.n_layers * LLAMA.n_q_heads * pairs * LLAMA.head_dim * 4
    work = step_work(LLAMA, n_tokens=chunk, context=context, bits_per_weight=8, kv_bytes_per_token=0)
    assert work.attention_ops == pytest.approx(counted)


@given(total=st.integers(1, 300), chunk=st.integers(1, 64))
def test_the_work_of_a_prompt_does_not_depend_on_how_it_is_cut(total: int, chunk: int) -> None:
    def ops(size: int) -> tuple[float, float]:
        parts = [
            step_work(
                LLAMA,
                n_tokens=min(size, total - start),
                context=start,
                bits_per_weight=8,
                kv_bytes_per_token=0,
                logits=0,
            )
            for start in range(0, total, size)
        ]
        return sum(part.ops for part in parts), sum(part.attention_ops for part in parts)

    assert ops(chunk) == pytest.approx(ops(total))


def test_a_cached_token_costs_what_its_page_costs() -> None:
    pages = PageSpec(24, 8, 64, 32)
    assert kv_bytes_per_token(pages, compressed=False) == pages.fp16_cache_bytes(1)
    assert kv_bytes_per_token(pages, compressed=True) == 24 * pages.warm_bytes / 32


def test_weights_in_ram_include_the_embedding() -> None:
    assert weights_bytes(LLAMA, 4.5) == int(LLAMA.parameters * 4.5 / 8)
