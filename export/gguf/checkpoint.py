"""A GGUF file as a checkpoint: its tensors under the names and in the order of rows that Hugging Face uses."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path

import torch

from edgekv.errors import CheckpointError, EngineMissing

from ..checkpoint import EMBEDDING, FINAL_NORM, HEAD, Checkpoint, assemble
from ..config import DecoderConfig
from ..weight_files import Stored
from .config import ROPE_FACTORS, read_gguf_config
from .file import GgufFile, read_gguf
from .sampling import not_applied, read_gguf_sampling
from .tokenizer import read_gguf_tokenizer

_WHOLE = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": HEAD}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: Norms that some architectures name by where they are.
_NORMS = {
    "olmo2": {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
    "seed_oss": {"post_attention_norm": "post_attention_layernorm"},
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
#: Architectures whose converter reorders the rows of queries and keys, so that channels that are rotated together are neighbours.
_REORDERED = ("llama", "smollm3")


def open_gguf(path: Path, context: int | None = None) -> Checkpoint:
    """Open a GGUF file and check that it is whole.

    Args:
        context: the most tokens of a text; None: as many as the model was made for.

    Raises:
        CheckpointError: it is damaged, or holds a model that edgekv does not export; the message names what.
        EngineMissing: the package that reads such files is not installed.
    """
    try:
        file = read_gguf(path)
    except ImportError as error:
        raise EngineMissing('GGUF files need a package; install it: pip install "edgekv[gguf]"') from error
    config = read_gguf_config(file, context)
    tokenizer = read_gguf_tokenizer(file, config.model.vocab_size)
    checkpoint = assemble(path, config, _located(file, config), tokenizer)
    return replace(checkpoint, sampling=read_gguf_sampling(file), not_applied=not_applied(file))


def _located(file: GgufFile, config: DecoderConfig) -> dict[str, Stored]:
    location: dict[str, Stored] = {}
    parts = _LAYER | _NORMS.get(str(file.metadata["general.architecture"]), {})
    for name, stored in file.tensors.items():
        if name == ROPE_FACTORS:
            continue  # part of the configuration
        block = _BLOCK.fullmatch(name)
        if name in _WHOLE:
            location[_WHOLE[name]] = stored
        elif block is not None and block[2] in parts:
            location[f"model.layers.{block[1]}.{parts[block[2]]}.{block[3]}"] = _in_order(
                file, config, block[2], stored
            )
        else:
            raise CheckpointError(
                f"{file.path}: tensor {name} would be left out: edgekv knows no {file.metadata['general.architecture']} decoder"
                " that has it"
            )
    return location


def _in_order(file: GgufFile, config: DecoderConfig, kind: str, stored: Stored) -> Stored:
    heads = {"attn_q": config.model.n_q_heads, "attn_k": config.model.n_kv_heads}.get(kind)
    if heads is None or file.metadata["general.architecture"] not in _REORDERED:
        return stored
    return stored.rearranged(functools.partial(_halves_apart, heads))


def _halves_apart(heads: int, tensor: torch.Tensor) -> torch.Tensor:
    """Return rows whose rotated pairs lie half a head apart; the converter put them side by side."""
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
