"""A Hugging Face checkpoint folder: its decoder's shape, and its tensors one at a time.

Invariant: once :func:`open_checkpoint` returns, every tensor that the decoder needs is present with the right shape, and every
tensor that is present is needed, or known to follow from the others. Tensors are read when asked for and not kept, so an export
needs the memory of a layer, not of a model.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from edgekv.bundle import SamplingSpec
from edgekv.errors import CheckpointError

from .config import DecoderConfig, not_applied, read_config, read_sampling
from .fold import FINAL_NORM as FINAL_NORM
from .fold import FINAL_NORM_BIAS as FINAL_NORM_BIAS
from .fold import fold_scales
from .tokenizer import TokenizerFiles, read_tokenizer
from .weight_files import Stored, decoder_alone, locate_tensors

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
#: The norms of a layer, by where they are.
_NORMS = {
    "before": ("input_layernorm", "post_attention_layernorm"),
    "behind": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "around": (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ),
    "shared": ("input_layernorm",),
}  # fmt: skip
#: What checkpoints of some model types hold as one tensor, row below row.
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
#: Where the name of a tensor of a layer says which part of the layer it is of.
_PART = re.compile(r"^(model\.layers\.\d+\.)(.+)\.(?=\w+$)")
#: As safetensors files name them.
_FLOATS = {"F32", "F16", "BF16"}
#: Tensors of old checkpoints that follow from config.json: caches of the rotary embedding.
_DERIVED = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. ``source``: its folder or file. ``location`` says where each tensor of the decoder is stored.

    ``sampling``: how its makers choose tokens; None: greedily. ``not_applied``: what else they ask for, which would change an
    answer and which edgekv does not do, with its value.
    """

    source: Path
    config: DecoderConfig
    location: Mapping[str, Stored]
    tokenizer: TokenizerFiles
    sampling: SamplingSpec | None = None
    not_applied: Mapping[str, Any] = field(default_factory=dict)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor as float32.

        Raises:
            CheckpointError: the tensor is not in the checkpoint.
        """
        stored = self.location.get(name)
        if stored is None:
            raise CheckpointError(f"{self.source}: tensor {name} is missing; download the checkpoint again")
        return stored.read().to(torch.float32)

    @property
    def head(self) -> str:
        """The tensor of the output head; the embedding's when they are tied."""
        return EMBEDDING if self.config.model.tied_embeddings else HEAD

    @property
    def matrices(self) -> dict[str, Stored]:
        """The tensors that products read, or whose rows are looked up."""
        return {name: stored for name, stored in self.location.items() if len(stored.shape) == 2}

    @property
    def quantised(self) -> bool:
        """Whether matrices are stored as codes."""
        return any(stored.dtype not in _FLOATS for stored in self.matrices.values())

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones counted once."""
        return sum(_elements(shape) for shape in expected_shapes(self.config).values())

    def sha256(self, progress: Callable[[int], None] = lambda size: None) -> str:
        """Hash the weights by name and bytes, scales folded in: the same for every way of sharding and exporting them.

        Args:
            progress: called with the number of bytes hashed since the last call.

        Raises:
            CheckpointError: a weight is not finite.
        """
        digest = hashlib.sha256()
        for name in sorted(expected_shapes(self.config)):
            stored = self.location[name]
            tensor = stored.read().contiguous()
            wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
            if wrong:
                raise CheckpointError(
                    f"{stored.file}: tensor {stored.name} holds {wrong} values that are not finite (NaN or infinite);"
                    " the checkpoint is damaged, download it again"
                )
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            data = tensor.view(torch.uint8).numpy()
            digest.update(data)
            progress(data.nbytes)
        return digest.hexdigest()


def open_checkpoint(folder: Path, context: int | None = None) -> Checkpoint:
    """Open a Hugging Face checkpoint folder and check that it is whole.

    Args:
        context: the most tokens of a text; None: as many as the model was made for.

    Raises:
        CheckpointError: something that the export needs is missing, damaged, or of the wrong shape.
        UsageError: the context cannot be had.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; SOURCE must be a Hugging Face checkpoint folder (or `demo`)")
    config = read_config(folder, context)
    tokenizer = read_tokenizer(folder, config.model.vocab_size)
    location = locate_tensors(folder)
    if config.text_part:
        location = decoder_alone(location)
    checkpoint = assemble(folder, config, location, tokenizer)
    _refuse_codes(checkpoint.location)
    return replace(checkpoint, sampling=read_sampling(folder), not_applied=not_applied(folder))


def assemble(source: Path, config: DecoderConfig, location: dict[str, Stored], tokenizer: TokenizerFiles) -> Checkpoint:
    """Put together what was read of a checkpoint, and check that it is whole.

    Args:
        location: where every tensor of the source is stored, by its name in a Hugging Face checkpoint.

    Raises:
        CheckpointError: a tensor is missing, has another shape than the decoder's, or would be left out.
    """
    location = _renamed(config, location)
    if config.fused:
        location = _cut(source, config, location)
    config = _untie(config, location)
    expected = expected_shapes(config)
    _check_shapes(source, location, expected, {new: old for old, new in config.renamed})
    _refuse_leftovers(source, location, expected)
    tensors = fold_scales(config, {name: location[name] for name in expected})
    return Checkpoint(source, _with_ends(config, tokenizer), tensors, tokenizer)


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
    if config.norm_kind == "biased":
        shapes[FINAL_NORM_BIAS] = (hidden,)
    if not model.tied_embeddings:
        shapes[HEAD] = (vocab, hidden)
    linears = (
        ("self_attn.q_proj", q_width, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv_width, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv_width, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, q_width, config.output_bias),
        *[("mlp.gate_proj", inner, hidden, config.mlp_bias)] * (model.mlp_matrices == 3),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    )
    for layer in range(model.n_layers):
        prefix = f"model.layers.{layer}."
        for name, rows, columns, bias in linears:
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        for name in _NORMS[config.norms]:
            shapes[f"{prefix}{name}.weight"] = (hidden,)
            if config.norm_kind == "biased":
                shapes[f"{prefix}{name}.bias"] = (hidden,)
        for name, width in config.qk_norm_widths.items():
            shapes[f"{prefix}self_attn.{name}.weight"] = (width,)
    return shapes


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _renamed(config: DecoderConfig, location: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return tensors under the names that the parts of a layer have in most model types."""
    names = dict(config.renamed)
    return {
        _PART.sub(lambda found: f"{found[1]}{names.get(found[2], found[2])}.", name): location[name]
        for name in location
    }


def _cut(source: Path, config: DecoderConfig, location: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return fused tensors as the rows that the decoder's own are; the others as they are."""
    shapes, cut = expected_shapes(config), dict(location)
    for layer in range(config.model.n_layers):
        for fused in config.fused:
            prefix = f"model.layers.{layer}."
            parts = {f"{prefix}{name}.weight": shapes[f"{prefix}{name}.weight"] for name in _FUSED[fused]}
            rows, columns = sum(shape[0] for shape in parts.values()), next(iter(parts.values()))[1]
            _check_shapes(source, location, {f"{prefix}{fused}.weight": (rows, columns)}, {})
            whole, first = cut.pop(f"{prefix}{fused}.weight"), 0
            for name, shape in parts.items():
                cut[name] = whole.rearranged(functools.partial(_rows, first, first + shape[0]), shape)
                first += shape[0]
    return cut


def _rows(first: int, end: int, whole: torch.Tensor) -> torch.Tensor:
    return whole[first:end]


def _untie(config: DecoderConfig, location: dict[str, Stored]) -> DecoderConfig:
    """Settle what a tied head is: like transformers, go by the tensors where they contradict the configuration."""
    if not config.model.tied_embeddings or HEAD not in location:
        return config
    if EMBEDDING not in location:
        location[EMBEDDING] = location.pop(HEAD)  # the one matrix may be stored under either name
    elif torch.equal(location[EMBEDDING].read().float(), location[HEAD].read().float()):
        del location[HEAD]
    else:
        return replace(config, model=replace(config.model, tied_embeddings=False))
    return config


def _check_shapes(
    source: Path, location: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]], names: Mapping[str, str]
) -> None:
    """Hold tensors against the decoder's. ``names``: what the checkpoint calls parts of a layer that have other names here."""
    for name, shape in expected.items():
        stored = location.get(name)
        name = _PART.sub(lambda found: f"{found[1]}{names.get(found[2], found[2])}.", name)
        if stored is None:
            raise CheckpointError(
                f"{source}: tensor {name} is missing; download the checkpoint again, or check its configuration"
            )
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.file}: tensor {name} has shape {list(stored.shape)}, the configuration says {list(shape)};"
                " the weights and their configuration do not belong together"
            )


def _refuse_codes(location: Mapping[str, Stored]) -> None:
    for name, stored in location.items():
        if stored.dtype not in _FLOATS:
            raise CheckpointError(
                f"{stored.file}: tensor {name} is {stored.dtype}; edgekv exports from float32, float16 and bfloat16 checkpoints"
            )


def _refuse_leftovers(source: Path, location: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> None:
    left = sorted(name for name in location if name not in expected and not name.endswith(_DERIVED))
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise CheckpointError(
            f"{source}: tensor {location[left[0]].name}{more} would be left out: the configuration describes a decoder"
            " without it; export the checkpoint that belongs to this configuration"
        )
