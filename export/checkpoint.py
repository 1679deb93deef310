"""A Hugging Face checkpoint folder: its decoder's shape, and its tensors one at a time.

Invariant: once :func:`open_checkpoint` returns, every tensor that the decoder needs is present with the right shape.
Tensors are read when asked for and not kept, so an export needs the memory of a layer, not of a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from edgekv.errors import CheckpointError
from edgekv.model_config import read_json_object

from .config import DecoderConfig, read_config
from .tokenizer import TokenizerFiles, read_tokenizer

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
_DTYPES = {"F32", "F16", "BF16"}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. ``location`` maps each tensor's name to the file that holds it."""

    folder: Path
    config: DecoderConfig
    location: Mapping[str, Path]
    tokenizer: TokenizerFiles

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor as float32.

        Raises:
            CheckpointError: the tensor is not in the checkpoint.
        """
        path = self.location.get(name)
        if path is None:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing; download the checkpoint again")
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor.to(torch.float32)

    @property
    def head(self) -> str:
        """The tensor of the output head; the embedding's when they are tied."""
        return EMBEDDING if self.config.model.tied_embeddings else HEAD

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones counted once."""
        return sum(_elements(shape) for shape in expected_shapes(self.config).values())

    def sha256(self, progress: Callable[[int], None] = lambda size: None) -> str:
        """Hash the weights by name and stored bytes: the same for every way of sharding and exporting them.

        Args:
            progress: called with the number of bytes hashed since the last call.
        """
        digest = hashlib.sha256()
        for name in sorted(expected_shapes(self.config)):
            with safe_open(self.location[name], framework="pt") as file:
                tensor = file.get_tensor(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            data = tensor.view(torch.uint8).numpy()
            digest.update(data)
            progress(data.nbytes)
        return digest.hexdigest()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a Hugging Face checkpoint folder and check that it is whole.

    Raises:
        CheckpointError: something that the export needs is missing, damaged, or of the wrong shape.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; SOURCE must be a Hugging Face checkpoint folder (or `demo`)")
    config = read_config(folder)
    tokenizer = read_tokenizer(folder, config.model.vocab_size)
    location = _locate(folder)
    _check_shapes(folder, location, expected_shapes(config))
    return Checkpoint(folder, _with_ends(config, tokenizer), location, tokenizer)


def _with_ends(config: DecoderConfig, tokenizer: TokenizerFiles) -> DecoderConfig:
    """Add the tokenizer's own end token to those that end a text, and its first token where the config names none."""
    model, eos = config.model, tokenizer.eos_token_id
    ends = model.eos_token_ids if eos is None or eos in model.eos_token_ids else (*model.eos_token_ids, eos)
    bos = model.bos_token_id if model.bos_token_id is not None else tokenizer.bos_token_id
    return replace(config, model=replace(model, eos_token_ids=ends, bos_token_id=bos))


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that the decoder uses."""
    model = config.model
    hidden, inner, vocab = model.hidden_size, model.intermediate_size, model.vocab_size
    q_width, kv_width = model.n_q_heads * model.head_dim, model.n_kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab, hidden), FINAL_NORM: (hidden,)}
    if not model.tied_embeddings:
        shapes[HEAD] = (vocab, hidden)
    linears = (
        ("self_attn.q_proj", q_width, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv_width, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv_width, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, q_width, config.output_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    )
    for layer in range(model.n_layers):
        prefix = f"model.layers.{layer}."
        for name, rows, columns, bias in linears:
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                shapes[f"{prefix}self_attn.{name}.weight"] = (model.head_dim,)
    return shapes


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _locate(folder: Path) -> dict[str, Path]:
    """Map tensor names to files, from the index when the checkpoint is sharded."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names: dict[str, Any] = read_json_object(index).get("weight_map", {})
        files = sorted({folder / str(file) for file in names.values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} has no *.safetensors file; convert the checkpoint: save_pretrained() writes them"
        )
    location: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: {file.name} is missing (the index names it); download the checkpoint again"
            )
        try:
            with safe_open(file, framework="pt") as opened:
                location.update(dict.fromkeys(opened.keys(), file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is truncated or not a safetensors file ({error}); download the checkpoint again"
            ) from error
    return location


def _check_shapes(folder: Path, location: Mapping[str, Path], expected: Mapping[str, tuple[int, ...]]) -> None:
    by_file: dict[Path, list[str]] = {}
    for name in expected:
        if name not in location:
            raise CheckpointError(
                f"{folder}: tensor {name} is missing; download the checkpoint again, or check config.json"
            )
        by_file.setdefault(location[name], []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name in names:
                view = opened.get_slice(name)
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
                if shape != expected[name]:
                    raise CheckpointError(
                        f"{file}: tensor {name} has shape {list(shape)}, config.json says {list(expected[name])};"
                        " the checkpoint and its config.json do not belong together"
                    )
                if dtype not in _DTYPES:
                    raise CheckpointError(
                        f"{file}: tensor {name} is {dtype}; edgekv exports from float32, float16 and bfloat16 checkpoints"
                    )
