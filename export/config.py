"""A Hugging Face config.json read into the few facts that shape a decoder.

Invariant: what :func:`read_config` returns can be exported; everything that cannot is refused here, by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekv.errors import CheckpointError
from edgekv.export.rope import read_rope
from edgekv.spec import ModelSpec

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
#: Architectures whose sliding window is off unless ``use_sliding_window`` says otherwise.
_WINDOW_BY_SWITCH = ("qwen2", "qwen3", "smollm3")


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder's shape. ``rotated[l]`` is False where layer l has no position embedding (SmolLM3)."""

    model: ModelSpec
    rms_eps: float
    rotated: tuple[bool, ...]
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download the checkpoint again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; download the checkpoint again")
    return data


def read_config(folder: Path) -> DecoderConfig:
    """Read ``config.json`` and ``generation_config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: no config.json, an architecture or a setting that edgekv does not export, a number missing.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json; SOURCE must be a Hugging Face checkpoint folder (or `demo`)"
        )
    config = read_json(path)
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        names = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{path}: unknown architecture {architecture!r}; edgekv exports {names}")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{path}: the checkpoint is already quantised; export the original one with --weights int4"
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"{path}: activation {activation!r} is not supported; edgekv exports silu decoders")
    n_layers, hidden, n_heads = (_count(config, path, key) for key in _REQUIRED[:3])
    intermediate, vocab, max_context = (_count(config, path, key) for key in _REQUIRED[3:])
    n_kv_heads = config.get("num_key_value_heads") or n_heads
    head_dim = config.get("head_dim") or hidden // n_heads
    if n_heads % n_kv_heads:
        raise CheckpointError(f"{path}: {n_heads} query heads do not divide into {n_kv_heads} KV heads")
    if head_dim % 4:
        raise CheckpointError(f"{path}: head_dim {head_dim} is not a multiple of 4, which pages need")
    eos = config.get("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = _as_list(eos) + [i for i in _as_list(read_json(generation).get("eos_token_id")) if i not in _as_list(eos)]
    attention_bias = bool(config.get("attention_bias", False))
    model = ModelSpec(
        architecture=architecture,
        n_layers=n_layers,
        hidden_size=hidden,
        n_q_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_context=max_context,
        rope=read_rope(config, head_dim, max_context),
        softmax_scale=head_dim**-0.5,
        windows=_windows(config, n_layers),
        tied_embeddings=bool(config.get("tie_word_embeddings", architecture == "smollm3")),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=tuple(_as_list(eos)),
    )
    return DecoderConfig(
        model=model,
        rms_eps=float(config.get("rms_norm_eps", 1e-6)),
        rotated=_rotated(config, n_layers),
        qk_norm=architecture == "qwen3",
        qkv_bias=architecture == "qwen2" or attention_bias,
        output_bias=architecture != "qwen2" and attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


def _count(config: dict[str, Any], path: Path, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: {key} is {value!r}; it must be a positive whole number")
    return value


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _windows(config: dict[str, Any], n_layers: int) -> tuple[int, ...]:
    window = config.get("sliding_window") or 0
    by_switch = config["model_type"] in _WINDOW_BY_SWITCH
    if by_switch and not config.get("use_sliding_window"):
        window = 0
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 0) if by_switch else 0
        return tuple(window if layer >= first else 0 for layer in range(n_layers))
    if len(types) != n_layers or set(types) - {"full_attention", "sliding_attention"}:
        raise CheckpointError(
            f"config.json: layer_types {sorted(set(types))} for {n_layers} layers is not supported;"
            " edgekv exports full_attention and sliding_attention, one entry per layer"
        )
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _rotated(config: dict[str, Any], n_layers: int) -> tuple[bool, ...]:
    if config["model_type"] != "smollm3":
        return (True,) * n_layers
    flags = config.get("no_rope_layers")
    if flags is None:
        interval = config.get("no_rope_layer_interval", 4)
        flags = [(layer + 1) % interval != 0 for layer in range(n_layers)]
    return tuple(bool(flag) for flag in flags)
