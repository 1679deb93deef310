"""GGUF files for tests, written from Hugging Face checkpoints as llama.cpp's converter does it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
}  # fmt: skip
#: Where a block has its float16 scales, by type.
SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)}
#: Where architectures name norms by where they are.
NORMS = {
    "olmo2": {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"},
    "seed_oss": {"post_attention_layernorm": "post_attention_norm"},
}


def gguf_name(name: str, architecture: str) -> str:
    """Return the name in GGUF of a tensor of a checkpoint."""
    owner, leaf = name.removeprefix("model.").rsplit(".", 1)
    if not owner.startswith("layers."):
        return f"{NAMES[owner]}.{leaf}"
    _, layer, rest = owner.split(".", 2)
    return f"blk.{layer}.{(NAMES | NORMS.get(architecture, {}))[rest]}.{leaf}"


def side_by_side(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Put the two channels that are rotated together next to each other."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def metadata(folder: Path, architecture: str) -> dict[str, Any]:
    """Return the keys of the decoder, as the converter states them."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {
        "general.architecture": architecture,
        f"{architecture}.block_count": config["num_hidden_layers"],
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.attention.head_count": config["num_attention_heads"],
        f"{architecture}.attention.head_count_kv": config["num_key_value_heads"],
        f"{architecture}.attention.key_length": config["head_dim"],
        f"{architecture}.attention.value_length": config["head_dim"],
        f"{architecture}.attention.layer_norm_rms_epsilon": np.float32(config["rms_norm_eps"]),
        f"{architecture}.rope.freq_base": np.float32(rope.get("rope_theta", config.get("rope_theta"))),
        f"{architecture}.rope.dimension_count": config["head_dim"],
    }


def vocabulary(tokenizer: Tokenizer, pre: str, **named: int) -> dict[str, Any]:
    """Return the keys of a byte-level BPE; special tokens are those that the tokenizer says are."""
    model = json.loads(tokenizer.to_str())
    special = {entry["id"] for entry in model["added_tokens"] if entry["special"]}
    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=lambda token: ids[token])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if number in special else 1 for number in range(len(tokens))],
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{name}_token_id": number for name, number in named.items()},
    }


def tensors(folder: Path, architecture: str) -> dict[str, NDArray[np.float32]]:
    """Return the tensors of a checkpoint in the names and the order of rows of GGUF."""
    config = json.loads((folder / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    result = {gguf_name(name, architecture): value for name, value in load_file(folder / "model.safetensors").items()}
    for name, value in result.items():
        kind = name.split(".")[-2]
        if architecture in ("llama", "smollm3") and kind in heads:
            result[name] = side_by_side(value, heads[kind])
    return result


def encoded(value: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[Any]:
    """Return a tensor as a type stores it; for those that the package cannot write, a tensor of random codes and small scales."""
    try:
        return quants.quantize(value, kind)
    except NotImplementedError:
        block, size = GGML_QUANT_SIZES[kind]
        codes = np.random.default_rng(0).integers(0, 256, (*value.shape[:-1], value.shape[-1] // block, size), np.uint8)
        for first in SCALES[kind.name]:
            codes[..., first : first + 2] = np.array([2e-3 / block], "<f2").view(np.uint8)
        return codes.reshape(*value.shape[:-1], -1)


def write_gguf(
    path: Path,
    keys: dict[str, Any],
    weights: dict[str, NDArray[np.float32]],
    kind: GGMLQuantizationType,
    others: Mapping[str, GGMLQuantizationType] = MappingProxyType({}),
) -> Path:
    """Write a file; matrices are stored as ``kind``, or as ``others`` says by their names, vectors as floats."""
    writer = GGUFWriter(path, keys["general.architecture"])
    for key, value in keys.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, np.float32):
            writer.add_float32(key, float(value))
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in weights.items():
        stored = others.get(name, kind) if value.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, encoded(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(
    folder: Path,
    path: Path,
    architecture: str,
    kind: GGMLQuantizationType,
    others: Mapping[str, GGMLQuantizationType] = MappingProxyType({}),
    /,
    **keys: Any,
) -> Path:
    """Write a whole checkpoint folder as a GGUF file."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    named = {"bos": config["bos_token_id"], "eos": config["eos_token_id"]}
    everything = {**metadata(folder, architecture), **vocabulary(tokenizer, "gpt-2", **named), **keys}
    return write_gguf(path, everything, tensors(folder, architecture), kind, others)
