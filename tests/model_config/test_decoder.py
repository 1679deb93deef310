"""A configuration means what it means to transformers, with any key left out or changed, or it is refused by that key's name."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from edgekv.errors import ConfigError, UsageError
from edgekv.export.config import decoder_config
from edgekv.model_config import ARCHITECTURES, TEXT_PARTS, read_model_config
from tests.cases import seldom
from tests.model_config.oracle import built_by_transformers, read_by_edgekv

#: What makes sense for a model type instead of what is in FULL.
OWN: dict[str, dict[str, Any]] = {
    "arcee": {"hidden_act": "relu2"},
    "starcoder2": {"hidden_act": "gelu_pytorch_tanh"},
    "stablelm": {"head_dim": 8},
}
#: Every key stated, with values that are no defaults.
FULL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 3,
    "eos_token_id": 4,
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "use_bias": True,
    "use_qkv_bias": True,
    "use_parallel_residual": True,
    "logit_scale": 0.5,
    "layer_norm_eps": 1e-4,
    "norm_epsilon": 1e-4,
    "use_sliding_window": True,
    "sliding_window": 6,
    "max_window_layers": 1,
    "no_rope_layer_interval": 2,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.125,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_local_base_freq": 700.0,
    "query_pre_attn_scalar": 24,
    "sliding_window_pattern": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROPE = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "partial_rotary_factor",
    "beta_fast",
    "attention_factor",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
#: Other values that make sense, for every key that any model type reads, and for some that none does.
CHANGES: dict[str, list[Any]] = {
    "vocab_size": [41],
    "hidden_size": [36, 64, 30],
    "intermediate_size": [20],
    "num_hidden_layers": [1, 5],
    "num_attention_heads": [2, 8, 3],
    "num_key_value_heads": [1, 4, 3, 8],
    "head_dim": [8, 16, 6, 10],
    "max_position_embeddings": [64],
    "hidden_act": ["swish", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "nonsense"],
    "hidden_activation": ["silu", "gelu", "relu"],
    "rms_norm_eps": [1e-6, 0.5],
    "rope_theta": [1e6, 10000],
    "tie_word_embeddings": [False],
    "bos_token_id": [0, 39, 40, -1, [1, 2]],
    "eos_token_id": [[1, 2], [7], []],
    "attention_bias": [False],
    "attention_out_bias": [False],
    "mlp_bias": [False],
    "use_bias": [False],
    "use_qkv_bias": [False],
    "qk_layernorm": [True],
    "use_parallel_residual": [False],
    "logit_scale": [0.25, -1.0],
    "layer_norm_eps": [1e-6, 0.5],
    "norm_epsilon": [1e-6, 0.5],
    "use_sliding_window": [False],
    "sliding_window": [3, 4096],
    "max_window_layers": [0, 2, 3, 28, -1],
    "no_rope_layer_interval": [3, 1, 100, -2],
    "no_rope_layers": [[1, 0, 1], [0, 0, 0], [1, 0, 1, 1], [1, 0], []],
    "layer_types": [
        ["full_attention"] * 3,
        ["sliding_attention"] * 3,
        ["full_attention", "sliding_attention", "full_attention"],
        ["linear_attention"] * 3,
        ["full_attention"] * 2,
    ],
    "embedding_multiplier": [3, 1e-9, -2.0],
    "attention_multiplier": [2, 0.5, -1.0],
    "residual_multiplier": [1, 0.5, 0.0],
    "logits_scaling": [4, 0.5, 1e9],
    "rope_local_base_freq": [2e4],
    "query_pre_attn_scalar": [12, 256],
    "sliding_window_pattern": [1, 3, -2, 0, "LLG"],
    "attn_logit_softcapping": [50.0, 20.0, None],
    "final_logit_softcapping": [30.0, 15.0, None],
    "use_bidirectional_attention": [True],
    "partial_rotary_factor": [0.5, 1.0],
    "original_max_position_embeddings": [64],
    "rope_parameters": [
        {},
        {"rope_type": "default", "rope_theta": 3e4},
        {"rope_theta": 3e4},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
        {"type": "linear", "factor": 2},
        LLAMA3,
        {**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 2e4},
        {**LLAMA3, "low_freq_factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "yarn", "factor": 4.0},
        YARN,
        {**YARN, "factor": None},
        {**YARN, "attention_factor": 0.7},
        {**YARN, "beta_fast": 16, "beta_slow": 2.0},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
        {**YARN, "mscale": 0.7},
        {**YARN, "truncate": False},
        {**YARN, "rope_theta": 1.0},
        {**YARN, "llama_4_scaling_beta": 0.1},
        {**YARN, "llama_4_scaling_beta": 0, "rope_theta": 3e4},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 1.0, "alpha": 100.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
        {"rope_type": "nonsense"},
        {"rope_type": "default", "mrope_section": [1, 2, 3]},
        {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}},
        {"full_attention": {"rope_type": "linear", "factor": 8.0}},
        {"sliding_attention": {"rope_type": "default", "rope_theta": 3e3}, "full_attention": None},
        {"full_attention": {"rope_type": "linear", "factor": 8.0}, "chunked_attention": {}},
    ],
    "quantization_config": [{"bits": 4}],
    "is_encoder_decoder": [True],
    "rope_interleaved": [True],
    "pretraining_tp": [4],
    "attention_dropout": [0.1],
    "num_experts": [4],
}
CHANGES["rope_scaling"] = CHANGES["rope_parameters"]
NONSENSE: list[Any] = [
    None,
    "many",
    "",
    0,
    -1,
    1.5,
    1e300,
    True,
    [],
    [None],
    [1.5],
    {},
    {"a": 1},
    math.nan,
    math.inf,
    10**40,
]


#: A null that means "left out" here, on which classes of transformers fall over.
NULL_BREAKS_TRANSFORMERS = [
    *(
        (kind, "head_dim", None)
        for kind in ("qwen2", "smollm3", "granite", "phi3", "olmo2", "olmo3", "exaone4", "cohere2")
    ),
    ("phi3", "partial_rotary_factor", None),
    ("stablelm", "partial_rotary_factor", None),
]

#: Of the other model types every key is changed in slow tests: seconds each.
EVERY_KEY = seldom(ARCHITECTURES, but=("llama",))


def full(kind: str) -> dict[str, Any]:
    """Return a configuration that states every key, those that the model type ignores included."""
    return {"model_type": kind, **FULL, **OWN.get(kind, {})}


def assert_same_or_refused_by_name(config: dict[str, Any], *keys: str) -> None:
    """Check the promise for a configuration in which these keys are unusual."""
    ours, refusal = None, None
    try:
        ours = read_by_edgekv(config)
    except ConfigError as error:
        refusal = str(error)
    if refusal is None:
        assert ours == built_by_transformers(config)
    else:
        assert "\n" not in refusal
        assert any(key in refusal for key in keys), f"{refusal!r} names none of {keys}"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_configuration_means_what_transformers_builds_with_every_key_and_with_none(kind: str) -> None:
    required = {key: FULL[key] for key in ARCHITECTURES[kind].required}
    for config in (full(kind), {"model_type": kind, **required}):
        assert read_by_edgekv(config) == built_by_transformers(config)


@pytest.mark.parametrize("kind", EVERY_KEY)
def test_a_key_left_out_or_changed_means_what_it_means_to_transformers_or_is_refused_by_name(kind: str) -> None:
    assert set(ARCHITECTURES[kind].defaults) <= set(CHANGES), "a key that no test changes"
    for key, values in CHANGES.items():
        assert_same_or_refused_by_name({name: value for name, value in full(kind).items() if name != key}, key)
        for value in values:
            assert_same_or_refused_by_name({**full(kind), key: value}, key)


@pytest.mark.parametrize("kind", seldom(ARCHITECTURES, but=("llama",), mark=pytest.mark.exhaustive))
def test_a_value_of_the_wrong_kind_is_refused_in_one_line_unless_transformers_takes_it_too(kind: str) -> None:
    for key in ARCHITECTURES[kind].defaults:
        for value in NONSENSE:
            if (kind, key, value) not in NULL_BREAKS_TRANSFORMERS:
                assert_same_or_refused_by_name({**full(kind), key: value}, key)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_keys_that_change_together_mean_what_they_mean_to_transformers_or_are_refused_by_name(
    data: st.DataObject,
) -> None:
    config = full(data.draw(st.sampled_from(sorted(ARCHITECTURES))))
    keys = data.draw(st.lists(st.sampled_from(sorted(CHANGES)), min_size=2, max_size=4, unique=True))
    for key in keys:
        value = data.draw(st.sampled_from([..., *CHANGES[key]]), label=key)
        config = {name: old for name, old in config.items() if name != key}
        if value is not ...:
            config[key] = value
    assert_same_or_refused_by_name(config, *keys)


@pytest.mark.parametrize(
    "config", [{}, {"model_type": None}, {"model_type": ["llama"]}, {"model_type": "gemma3n"}, [], 7]
)
def test_a_model_type_that_edgekv_does_not_decode_is_named_with_those_that_it_does(config: object) -> None:
    kind = config.get("model_type") if isinstance(config, dict) else None
    with pytest.raises(ConfigError) as caught:
        read_model_config(config)
    known = ", ".join([*ARCHITECTURES, *TEXT_PARTS])
    assert str(caught.value) == f"config.json: unknown architecture {kind!r}; edgekv exports {known}"


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 8.0],
    "partial_rotary_factor": 0.5,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"type": "su", "rope_type": ..., "original_max_position_embeddings": 512},
        {"factor": 4.0},
        {"factor": 0.5},
        {"attention_factor": 1.25},
        {"partial_rotary_factor": 1.0, "short_factor": [1.0, 2.0, 3.0, 4.5], "long_factor": [5.0] * 4},
    ],
)
@pytest.mark.parametrize("context", [128, 4096])
def test_longrope_means_what_it_means_to_transformers_below_and_above_the_original_context(
    changes: dict[str, Any], context: int
) -> None:
    rope = {key: value for key, value in {**LONGROPE, **changes}.items() if value is not ...}
    config = {**full("phi3"), "head_dim": 8, "max_position_embeddings": 4096, "rope_scaling": rope}
    config["original_max_position_embeddings"] = 512
    ours = decoder_config(read_model_config(config), context=context).model.rope
    theirs = CONFIG_MAPPING["phi3"].from_dict(copy.deepcopy(config))
    module = Phi3RotaryEmbedding(theirs)
    module(torch.zeros(1), torch.tensor([[context - 1]]))
    assert ours.inv_freq == tuple(module.inv_freq.tolist())
    assert ours.attention_scaling == module.attention_scaling


@pytest.mark.parametrize(
    "changes",
    [{"short_factor": ...}, {"long_factor": [1.0]}, {"long_factor": [1.0, 0.0]}, {"short_factor": "1, 2"}],
)
def test_longrope_without_a_factor_for_every_frequency_is_refused_by_name(changes: dict[str, Any]) -> None:
    rope = {key: value for key, value in {**LONGROPE, **changes}.items() if value is not ...}
    with pytest.raises(ConfigError, match=rf"rope_scaling.*{next(iter(changes))}"):
        read_model_config({**full("phi3"), "head_dim": 8, "rope_scaling": rope})


def test_longrope_asks_for_the_context_where_its_factors_depend_on_it() -> None:
    config = {**full("phi3"), "head_dim": 8, "rope_scaling": LONGROPE, "original_max_position_embeddings": 64}
    read = read_model_config(config)
    assert read.max_context == 128
    with pytest.raises(UsageError, match=r"up to 64 tokens .*choose with --context 64 or --context 128"):
        decoder_config(read)
    with pytest.raises(UsageError, match="--context 129 is above what the model was made for, 128"):
        decoder_config(read, context=129)
    assert decoder_config(read, context=64).model.max_context == 64


def test_a_model_that_reads_images_means_the_decoder_in_it() -> None:
    text = full("gemma3_text")
    alone = read_model_config(text)
    inside = read_model_config({"model_type": "gemma3", "text_config": text, "eos_token_id": [4, 5]})
    assert (inside.architecture, inside.text_part, alone.text_part) == ("gemma3", True, False)
    assert replace(inside, architecture=alone.architecture, text_part=False, eos_token_ids=(4,)) == alone
    assert inside.eos_token_ids == (4, 5)


@pytest.mark.parametrize(
    ("changes", "tied"), [({}, True), ({"tie_word_embeddings": False}, False), ({"tie_word_embeddings": True}, True)]
)
def test_the_decoder_of_mistral_3_is_of_the_type_that_it_states_and_tied_as_the_outer_configuration_says(
    changes: dict[str, Any], tied: bool
) -> None:
    for kind in ("mistral", "ministral3"):
        config = {"model_type": "mistral3", "text_config": {**full(kind), "tie_word_embeddings": False}, **changes}
        read = read_model_config(config)
        assert (read.text_part, read.tied_embeddings, read.head_dim) == (True, tied, FULL["head_dim"])
    with pytest.raises(ConfigError, match=r"model_type is left out.*edgekv knows mistral and ministral3 here"):
        read_model_config({"model_type": "mistral3", "text_config": {}})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"text_config": None}, "lacks text_config"),
        ({"text_config": {"model_type": "llama"}}, "text_config: model_type is 'llama'"),
        ({"text_config": {"head_dim": 10}}, "text_config: head_dim 10"),
        ({"text_config": {"quantization_config": {"bits": 4}}}, "quantization_config"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False; text_config says True"),
    ],
)
def test_a_model_that_reads_images_is_refused_by_the_key_that_is_wrong(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_model_config({"model_type": "gemma3", "text_config": {}, **changes})
    assert named in str(caught.value)


def test_yarn_adds_the_positions_that_its_scaling_states() -> None:
    """Qwen2.5 states the length before the scaling."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = {"model_type": "qwen2", "max_position_embeddings": 32768}
    assert read_model_config(config).max_context == 32768
    assert read_model_config({**config, "rope_scaling": scaling}).max_context == 131072
