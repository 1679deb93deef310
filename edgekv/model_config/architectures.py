"""The model types that edgekv decodes, as data: a further one is a page here.

A page says which keys of a ``config.json`` the model type reads, what transformers takes for one that is left out, and what
the type fixes without a key. Source: the configuration classes of transformers 5.24; ``tests/test_model_config.py`` leaves out
and changes every key in turn and compares the meaning with theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from edgekv.model_config.rope import ROPE_TYPES

#: Which layers have a sliding window. ``none``: no layer. ``every``: all of them. ``any``: likewise. ``late``: where
#: ``use_sliding_window`` is set, those from ``max_window_layers`` on. ``unrotated``: likewise, those without RoPE.
#: ``pattern``: all but every ``sliding_window_pattern``-th, or every :attr:`Architecture.window_period`-th where there is no
#: such key. ``layer_types`` overrides the last four.
Windows = Literal["none", "every", "any", "late", "unrotated", "pattern"]
#: Where attention and MLP have norms: ``before``: what they read. ``behind``: what they add. ``around``: both. ``shared``: both
#: read the stream through one norm, and what they add is added at once.
Norms = Literal["before", "behind", "around", "shared"]
#: Norms of the residual stream: ``rms``: by the root of the mean square. ``layer``: of what differs from the mean. ``biased``:
#: likewise, and a bias is added.
NormKind = Literal["rms", "layer", "biased"]
#: Norms of queries and keys: ``heads``: of each head by itself. ``whole``: of all heads of a token at once.
#: ``turned``: of each head, behind RoPE.
QKNorms = Literal["none", "heads", "whole", "turned"]


@dataclass(frozen=True)
class Architecture:
    """One model type.

    ``defaults``: the keys that it reads, each with the value of one that is left out; None: there is none, or it follows from
    other keys. ``nullable``: keys that may be null although their default is a number; null then means what None does.
    ``qkv_bias``: queries, keys and values have biases without a key that says so. ``heads_divide_width``: the type insists
    that ``hidden_size`` is a multiple of ``num_attention_heads``, and ``heads_fill_width`` that query heads are as wide as it
    together. ``partial_rotary``: it heeds ``partial_rotary_factor``. ``rope_types``: those that it takes. ``fused``: parts of
    a layer that its checkpoints hold as one tensor. ``sliding_rope``: layers with a window have a rope of their own;
    ``sliding_theta``: its base where no key says another. ``scaled_embedding``: embedding rows are multiplied by the root of
    ``hidden_size``. ``gains_from_one``: what is stored of a norm's gain is added to 1. ``interleaved_rope``: channels that
    are turned together are neighbours in a head. ``gated``: the MLP has a gate. ``output_bias``: the output projection has a
    bias where queries have one by ``attention_bias``. ``renamed``: what its checkpoints call a part of a layer that has
    another name here. ``unrotated_full``: layers without a window have no RoPE where there is a ``sliding_window``. ``ends``:
    tokens that end a text where ``eos_token_id`` is null. ``tanh_gelu``: an activation called ``gelu`` means its tanh
    approximation. ``required``: keys without which transformers builds no such model. ``growing_queries``: behind the
    original context queries grow with their positions (``llama_4_scaling_beta``).
    """

    defaults: Mapping[str, object]
    nullable: frozenset[str] = frozenset({"num_key_value_heads"})
    windows: Windows = "none"
    window_period: int = 0
    heads_divide_width: bool = False
    heads_fill_width: bool = False
    norms: Norms = "before"
    norm_kind: NormKind = "rms"
    qk_norms: QKNorms = "none"
    qkv_bias: bool = False
    partial_rotary: bool = False
    rope_types: tuple[str, ...] = ROPE_TYPES
    fused: tuple[str, ...] = ()
    sliding_rope: bool = False
    sliding_theta: float = 0.0
    scaled_embedding: bool = False
    gains_from_one: bool = False
    interleaved_rope: bool = False
    gated: bool = True
    output_bias: bool = True
    tanh_gelu: bool = False
    unrotated_full: bool = False
    ends: tuple[int, ...] = ()
    required: tuple[str, ...] = ()
    growing_queries: bool = False
    renamed: tuple[tuple[str, str], ...] = ()


#: What all of them read. ``head_dim`` follows from the width, ``num_key_value_heads`` from the query heads.
_COMMON: dict[str, object] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_parameters": None,
    "rope_scaling": None,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
_NOT_OF_GEMMA = ("hidden_act", "original_max_position_embeddings")
_QWEN: dict[str, object] = {
    **_COMMON,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_LAYER_NORMED: dict[str, object] = {key: value for key, value in _COMMON.items() if key != "rms_norm_eps"}
_OLMO: dict[str, object] = {
    **_COMMON,
    "vocab_size": 50304,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "eos_token_id": 50279,
}
_GEMMA: dict[str, object] = {
    **{key: value for key, value in _COMMON.items() if key not in _NOT_OF_GEMMA},
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "use_bidirectional_attention": None,
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        {**_COMMON, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2},
        heads_divide_width=True,
    ),
    "mistral": Architecture(
        {
            **_COMMON,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        nullable=frozenset({"sliding_window"}),
        windows="every",
    ),
    "qwen2": Architecture(
        _QWEN, nullable=frozenset({"num_key_value_heads", "sliding_window"}), windows="late", qkv_bias=True
    ),
    "qwen3": Architecture(
        {**_QWEN, "head_dim": 128, "attention_bias": False},
        nullable=frozenset({"num_key_value_heads", "sliding_window"}),
        windows="late",
        qk_norms="heads",
    ),
    "smollm3": Architecture(
        {
            **_COMMON,
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        windows="unrotated",
    ),
    "granite": Architecture(
        {
            **_COMMON,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        }
    ),
    "phi3": Architecture(
        {
            **_COMMON,
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 32000,
        },
        windows="every",
        partial_rotary=True,
        rope_types=("default", "longrope"),
        fused=("self_attn.qkv_proj", "mlp.gate_up_proj"),
    ),
    "gemma3_text": Architecture(
        {
            **{key: value for key, value in _COMMON.items() if key not in _NOT_OF_GEMMA},
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "layer_types": None,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        nullable=frozenset(),
        windows="pattern",
        heads_divide_width=True,
        qk_norms="heads",
        rope_types=("default", "linear"),
        sliding_rope=True,
        scaled_embedding=True,
        gains_from_one=True,
        norms="around",
    ),
    "gemma": Architecture(
        {
            **{key: value for key, value in _GEMMA.items() if key != "hidden_activation"},
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
        nullable=frozenset(),
        scaled_embedding=True,
        gains_from_one=True,
        tanh_gelu=True,
    ),
    "gemma2": Architecture(
        {
            **_GEMMA,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "layer_types": None,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        nullable=frozenset(),
        windows="pattern",
        window_period=2,
        heads_divide_width=True,
        scaled_embedding=True,
        gains_from_one=True,
        norms="around",
    ),
    "cohere2": Architecture(
        {
            **_LAYER_NORMED,
            "vocab_size": 256000,
            "hidden_size": 8192,
            "intermediate_size": 22528,
            "num_hidden_layers": 40,
            "num_attention_heads": 64,
            "max_position_embeddings": 8192,
            "layer_norm_eps": 1e-5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
            "attention_bias": False,
            "logit_scale": 0.0625,
            "tie_word_embeddings": True,
            "bos_token_id": 5,
            "eos_token_id": 255001,
        },
        windows="pattern",
        norms="shared",
        norm_kind="layer",
        interleaved_rope=True,
        unrotated_full=True,
    ),
    "starcoder2": Architecture(
        {
            **_LAYER_NORMED,
            "vocab_size": 49152,
            "hidden_size": 3072,
            "intermediate_size": 12288,
            "num_hidden_layers": 30,
            "num_attention_heads": 24,
            "num_key_value_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 4096,
            "norm_epsilon": 1e-5,
            "sliding_window": None,
            "use_bias": True,
            "tie_word_embeddings": True,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
        nullable=frozenset(),
        windows="every",
        norm_kind="biased",
        gated=False,
        renamed=(("mlp.c_fc", "mlp.up_proj"), ("mlp.c_proj", "mlp.down_proj")),
    ),
    "stablelm": Architecture(
        {
            **_LAYER_NORMED,
            "vocab_size": 50304,
            "hidden_size": 2560,
            "intermediate_size": 6912,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
            "use_qkv_bias": False,
            "qk_layernorm": False,
            "use_parallel_residual": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        nullable=frozenset(),
        heads_divide_width=True,
        heads_fill_width=True,
        norm_kind="biased",
        partial_rotary=True,
    ),
    "ministral": Architecture(
        {
            **_COMMON,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "layer_types": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        nullable=frozenset(),
        windows="any",
        required=("head_dim",),
    ),
    "ministral3": Architecture(
        {
            **_COMMON,
            "vocab_size": 131072,
            "intermediate_size": 14336,
            "num_hidden_layers": 34,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        nullable=frozenset(),
        windows="every",
        growing_queries=True,
    ),
    "seed_oss": Architecture(
        {
            **_COMMON,
            "vocab_size": 155136,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 80,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "attention_out_bias": False,
            "mlp_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        nullable=frozenset({"num_key_value_heads", "head_dim"}),
    ),
    "olmo2": Architecture(_OLMO, norms="behind", qk_norms="whole"),
    "olmo3": Architecture(
        {**_OLMO, "rope_theta": 5e5, "sliding_window": 4096, "layer_types": None},
        windows="pattern",
        window_period=4,
        norms="behind",
        qk_norms="whole",
        sliding_rope=True,
        sliding_theta=5e5,
    ),
    "ernie4_5": Architecture(
        {
            **_COMMON,
            "vocab_size": 103424,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 18,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "use_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        nullable=frozenset({"num_key_value_heads", "head_dim"}),
        interleaved_rope=True,
    ),
    "arcee": Architecture(
        {
            **_COMMON,
            "hidden_size": 2560,
            "intermediate_size": 18432,
            "hidden_act": "relu2",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        heads_divide_width=True,
        gated=False,
    ),
    "hunyuan_v1_dense": Architecture(
        {
            **_COMMON,
            "vocab_size": 290943,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        qk_norms="turned",
        rope_types=(*ROPE_TYPES, "dynamic"),
        required=("head_dim",),
        renamed=(("self_attn.query_layernorm", "self_attn.q_norm"), ("self_attn.key_layernorm", "self_attn.k_norm")),
    ),
    "exaone4": Architecture(
        {
            **_COMMON,
            "vocab_size": 102400,
            "intermediate_size": 16384,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        nullable=frozenset({"sliding_window"}),
        windows="pattern",
        norms="behind",
        qk_norms="heads",
        unrotated_full=True,
    ),
    "glm4": Architecture(
        {
            **_COMMON,
            "vocab_size": 151552,
            "intermediate_size": 13696,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1.5625e-7,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
        },
        nullable=frozenset(),
        norms="around",
        partial_rotary=True,
        interleaved_rope=True,
        output_bias=False,
        fused=("mlp.gate_up_proj",),
        renamed=(
            ("post_self_attn_layernorm", "post_attention_layernorm"),
            ("post_attention_layernorm", "pre_feedforward_layernorm"),
            ("post_mlp_layernorm", "post_feedforward_layernorm"),
        ),
        ends=(151329, 151336, 151338),
    ),
}
#: Models of which edgekv exports the part that writes text, with the types that this part may have.
TEXT_PARTS: Mapping[str, tuple[str, ...]] = {"gemma3": ("gemma3_text",), "mistral3": ("mistral", "ministral3")}
