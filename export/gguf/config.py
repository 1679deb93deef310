"""The metadata of a GGUF file as the configuration of a decoder.

Source of the keys: docs/gguf.md of ggml, and llama.cpp's convert_hf_to_gguf.py, which writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from edgekv.errors import CheckpointError, ConfigError
from edgekv.model_config import ARCHITECTURES as MODEL_TYPES
from edgekv.model_config import read_model_config
from edgekv.schema import shown
from edgekv.spec import RopeSpec

from ..config import DecoderConfig, decoder_config
from .file import GgufFile

#: Model types by their name in GGUF. (Mistral is written as llama.)
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "seed_oss": "seed_oss",
    "olmo2": "olmo2",
}
#: Biases, of which the metadata says nothing: by their key in config.json, the tensor that is there if they are.
_BIASES = {"attention_bias": "blk.0.attn_q.bias", "attention_out_bias": "blk.0.attn_output.bias"}
#: Factors of the rotary frequencies, where a model scales them one by one (Llama 3.1 and later).
ROPE_FACTORS = "rope_freqs.weight"
#: Tokens that end a text, by key; the first is the end token proper.
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True)
class _Key:
    """A key behind the architecture's name: its name in config.json and what it may be."""

    name: str
    kind: type | tuple[type, ...] = int
    read: Callable[[Any], Any] = lambda value: value


def shortest(value: float) -> float:
    """Return the shortest decimal that is this float32: 1e-05 and not 9.999999747378752e-06, as config.json has it."""
    return float(str(np.float32(value)))


_KEYS = {
    "block_count": _Key("num_hidden_layers"),
    "context_length": _Key("max_position_embeddings"),
    "embedding_length": _Key("hidden_size"),
    "feed_forward_length": _Key("intermediate_size"),
    "attention.head_count": _Key("num_attention_heads"),
    "attention.head_count_kv": _Key("num_key_value_heads"),
    "attention.key_length": _Key("head_dim"),
    "attention.layer_norm_rms_epsilon": _Key("rms_norm_eps", (int, float), shortest),
    "rope.freq_base": _Key("rope_theta", (int, float), shortest),
}
_OPTIONAL = {"attention.head_count_kv", "attention.key_length", "rope.freq_base"}
#: Keys that say again what another one says, or nothing about the numbers that come out.
_KNOWN = {
    "vocab_size",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.finetuned",
    "tensor_data_layout",
}
_SCALING = {
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def read_gguf_config(file: GgufFile, context: int | None = None) -> DecoderConfig:
    """Turn the metadata into a decoder's configuration.

    Args:
        context: the most tokens of a text; None: as many as the model was made for.

    Raises:
        CheckpointError: an architecture or a setting that edgekv does not decode, or one that is missing.
    """
    architecture = file.get("general.architecture", str)
    model_type = ARCHITECTURES.get(architecture)
    if model_type is None:
        raise ConfigError(
            f"{file.path}: unknown architecture {shown(architecture)}; edgekv exports {', '.join(ARCHITECTURES)} from GGUF"
        )
    config = _config(file, architecture)
    rows = file.tensors.get("token_embd.weight")
    if rows is None:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing; convert the model to GGUF again")
    config |= {
        "model_type": model_type,
        "vocab_size": rows.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    read = MODEL_TYPES[model_type].defaults
    config |= {key: tensor in file.tensors for key, tensor in _BIASES.items() if key in read}
    further = tuple(file.metadata[key] for end in _ENDS if (key := f"tokenizer.ggml.{end}") in file.metadata)
    decoder = decoder_config(read_model_config(config, str(file.path)), further, context)
    factors = file.tensors.get(ROPE_FACTORS)
    if factors is None:
        return decoder
    rope = _divided(file, decoder.model.rope, factors.read())
    return replace(decoder, model=replace(decoder.model, rope=rope))


def _config(file: GgufFile, architecture: str) -> dict[str, Any]:
    prefix = f"{architecture}."
    given = {key.removeprefix(prefix): key for key in file.metadata if key.startswith(prefix)}
    config: dict[str, Any] = {}
    for name, key in _KEYS.items():
        if name in given or name not in _OPTIONAL:
            config[key.name] = key.read(file.get(prefix + name, key.kind))
    scaling = {
        name.removeprefix("rope.scaling."): file.metadata[key] for name, key in given.items() if "rope.scaling." in name
    }
    scaling.pop("finetuned", None)
    if scaling.get("type", "none") != "none":
        config["rope_scaling"] = _rope_scaling(file, scaling)
        config["rope_scaling"]["rope_theta"] = config.get("rope_theta", 10000.0)
    stray = next(
        (key for name, key in given.items() if name not in _KEYS | dict.fromkeys(_KNOWN) and "scaling." not in name),
        None,
    )
    if stray is not None:
        raise ConfigError(f"{file.path} has {stray} = {shown(file.metadata[stray])}; edgekv does not know this setting")
    _check_heads(file, prefix, given, config)
    return config


def _rope_scaling(file: GgufFile, scaling: Mapping[str, Any]) -> dict[str, Any]:
    stray = next((name for name in scaling if name not in _SCALING), None)
    if stray is not None:
        raise ConfigError(f"{file.path} has rope.scaling.{stray}; edgekv does not know this setting")
    return {_SCALING[name]: shortest(value) if isinstance(value, float) else value for name, value in scaling.items()}


def _check_heads(file: GgufFile, prefix: str, given: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Refuse heads whose keys and values, or whose rotated channels, differ in number: no decoder here has them."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or (config["hidden_size"] // heads if heads else 0)
    for name in ("attention.value_length", "rope.dimension_count"):
        if name in given and file.metadata[given[name]] != width:
            raise ConfigError(
                f"{file.path} has {prefix}{name} = {shown(file.metadata[given[name]])} and heads of {width}; edgekv exports"
                " decoders in which they are equal"
            )


def _divided(file: GgufFile, rope: RopeSpec, factors: torch.Tensor) -> RopeSpec:
    values = factors.reshape(-1).tolist()
    if len(values) != len(rope.inv_freq) or not all(0 < value < float("inf") for value in values):
        raise CheckpointError(
            f"{file.path}: {ROPE_FACTORS} does not hold {len(rope.inv_freq)} positive factors; convert the model to GGUF again"
        )
    return replace(rope, inv_freq=tuple(f / value for f, value in zip(rope.inv_freq, values, strict=True)))
