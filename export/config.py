"""A checkpoint's configuration as the exporter needs it: the model's spec, and what only the dense parts must know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgekv.errors import CheckpointError
from edgekv.model_config import ModelConfig, Values, read_json_object, read_model_config
from edgekv.spec import ModelSpec

from .rope import fold_rope


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder's shape. ``rotated[l]`` is False where layer l has no position embedding (SmolLM3).

    The scales are those of :class:`~edgekv.model_config.ModelConfig`; :mod:`edgekv.export.fold` puts them into weights.
    """

    model: ModelSpec
    rms_eps: float
    rotated: tuple[bool, ...]
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    @property
    def residual_eps(self) -> float:
        """The epsilon of norms of the residual stream, which is ``embedding_scale`` times as small as the checkpoint's."""
        return self.rms_eps / self.embedding_scale**2


def read_config(folder: Path) -> DecoderConfig:
    """Read ``config.json`` and ``generation_config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: no config.json, or one that edgekv does not export; the message names the key.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json; SOURCE must be a Hugging Face checkpoint folder (or `demo`)"
        )
    config = read_model_config(read_json_object(path), str(path))
    generation = folder / "generation_config.json"
    further: tuple[int, ...] = ()
    if generation.is_file():
        further = Values(read_json_object(generation), str(generation)).token_ids("eos_token_id")
    return decoder_config(config, further)


def decoder_config(config: ModelConfig, further_eos: tuple[int, ...] = ()) -> DecoderConfig:
    """Turn a configuration into what the exporter needs.

    Args:
        further_eos: tokens that end a text besides those of the configuration.

    Raises:
        CheckpointError: the rope settings give angles that are not finite.
    """
    eos = config.eos_token_ids
    model = ModelSpec(
        architecture=config.architecture,
        n_layers=config.n_layers,
        hidden_size=config.hidden_size,
        n_q_heads=config.n_q_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_context=config.max_context,
        rope=fold_rope(config.rope),
        softmax_scale=config.softmax_scale,
        windows=config.windows,
        tied_embeddings=config.tied_embeddings,
        bos_token_id=config.bos_token_id,
        # Some name -1, or a token beyond the vocabulary, to say that there is none.
        eos_token_ids=tuple(token for token in dict.fromkeys(eos + further_eos) if 0 <= token < config.vocab_size),
    )
    return DecoderConfig(
        model=model,
        rms_eps=config.rms_eps,
        rotated=config.rotated,
        embedding_scale=config.embedding_scale,
        residual_scale=config.residual_scale,
        logits_scale=config.logits_scale,
        qk_norm=config.qk_norm,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        mlp_bias=config.mlp_bias,
    )
