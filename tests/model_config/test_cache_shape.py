"""The shape of any model's keys and values: what a model of transformers really keeps, from its object and from its file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from edgekv.errors import ConfigError
from edgekv.model_config import ARCHITECTURES, CacheShape, read_cache_shape
from edgekv.model_config.cache_shape import LAYERS, defaults_table
from tools import list_cache_defaults

#: One of each way in which model types name their numbers, or leave them out.
KEPT = (
    "bitnet", "bloom", "cohere2", "ctrl", "falcon", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_oss",
    "gptj", "granite", "lfm2", "llama", "llama4_text", "mistral", "mixtral", "mpt", "olmo2", "opt", "persimmon",
    "phi", "phi3", "qwen2", "qwen3", "qwen3_5_text", "qwen3_moe", "smollm3", "stablelm", "starcoder2", "xglm",
)  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
def test_the_shape_is_that_of_the_keys_and_values_that_the_model_keeps(kind: str) -> None:
    config = CONFIG_MAPPING[kind]()
    for key in LAYERS:
        if key in config.to_dict():
            setattr(config, key, 2)
    for key in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(config, key, None), list):
            setattr(config, key, getattr(config, key)[-2:])  # the last ones attend in hybrids
    config.pad_token_id = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.bfloat16)
        cache = model(input_ids=torch.zeros(1, 3, dtype=torch.int64), use_cache=True).cache
    kept = {
        (layer.keys.shape, layer.values.shape) for layer in cache.layers if getattr(layer, "keys", None) is not None
    }
    shape = read_cache_shape({"model_type": kind})
    assert kept == {((1, shape.n_kv_heads, 3, shape.head_dim),) * 2}
    assert read_cache_shape(CONFIG_MAPPING[kind]()) == shape


@pytest.mark.slow
def test_a_key_left_out_means_what_it_means_to_transformers_for_every_model_type() -> None:
    kinds = (*ARCHITECTURES, *defaults_table()["keys"])
    assert [kind for kind in kinds if list_cache_defaults.disagreement(kind)] == []


def test_the_table_of_defaults_is_that_of_transformers() -> None:
    table = defaults_table()
    assert len(table["keys"]) > 150
    assert {kind: list_cache_defaults.defaults(kind) for kind in table["keys"]} == table["keys"]
    assert list_cache_defaults.texts() == table["texts"]


GEMMA = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34}


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"num_layers": 24, "num_kv_heads": 8, "head_dim": 64}, (24, 8, 64)),
        ({"n_layer": 6, "n_head": 4, "n_embd": 128}, (6, 4, 32)),
        ({"model_type": "gemma3", "text_config": GEMMA, "vision_config": {"hidden_size": 1152}}, (34, 4, 256)),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 34}}, (34, 4, 256)),
        ({"model_type": "llava", "text_config": {"model_type": "llama", "num_key_value_heads": 8}}, (32, 8, 128)),
        ({"model_type": "internvl_chat", "llm_config": {"model_type": "qwen2", "num_attention_heads": 64}}, (32, 32, 64)),
        ({"model_type": "qwen2_5_omni", "thinker_config": {"text_config": {**GEMMA}}}, (34, 4, 256)),
        ({"model_type": "qwen2_vl", "num_hidden_layers": 28, "hidden_size": 1536, "num_attention_heads": 12,
          "num_key_value_heads": 2}, (28, 2, 128)),
        ({"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 128,
          "hidden_size": 8192, "num_hidden_layers": 60}, (60, 8, 64)),
        ({"model_type": "chatglm", "num_layers": 28, "hidden_size": 4096, "num_attention_heads": 32, "kv_channels": 128,
          "multi_query_attention": True, "multi_query_group_num": 2}, (28, 2, 128)),
        ({"model_type": "mpt", "n_layers": 4, "n_heads": 8, "d_model": 512, "attn_config": {"kv_n_heads": 2}}, (4, 2, 64)),
        ({"model_type": "of tomorrow", "num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 64}, (2, 8, 8)),
    ],
)  # fmt: skip
def test_a_file_of_any_maker_gives_the_shape(config: dict[str, Any], shape: tuple[int, int, int]) -> None:
    assert read_cache_shape(config) == CacheShape(*shape)


def test_an_object_of_several_models_gives_the_shape_of_the_one_that_writes() -> None:
    assert read_cache_shape(CONFIG_MAPPING["gemma3"]()) == read_cache_shape(CONFIG_MAPPING["gemma3_text"]())
    assert read_cache_shape(CONFIG_MAPPING["llava"]()) == read_cache_shape({"model_type": "llama"})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, "num_attention_heads"),
        ({"num_layers": 2, "num_kv_heads": 2}, "hidden_size"),
        ({"num_kv_heads": 2, "head_dim": 8}, "num_hidden_layers"),
        ({"num_layers": 2, "num_heads": 8, "num_kv_heads": 3, "head_dim": 8}, "num_key_value_heads"),
        ({"num_layers": 2, "num_kv_heads": [2, 4], "head_dim": 8}, "num_kv_heads"),
        ({"model_type": "mistral", "num_attention_heads": 4}, "num_key_value_heads"),
        ({"model_type": "deepseek_v3"}, "kv_lora_rank"),
        ({"model_type": "mimo_v2_flash"}, "v_head_dim"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"model_type": "bart"}, "is_encoder_decoder"),
        ({"model_type": "mamba2"}, "mamba2"),
        ({"model_type": "gemma3"}, "text_config"),
        ({"model_type": "zamba2", "num_hidden_layers": 4}, "zamba2"),
        ({"text_config": GEMMA, "llm_config": GEMMA}, "text_config and llm_config"),
        ({"text_config": "gemma"}, "text_config"),
    ],
)
def test_what_has_no_shape_of_one_size_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_cache_shape(config)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
