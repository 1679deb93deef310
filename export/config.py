"""A checkpoint's configuration as the exporter needs it: the model's spec, and what only the dense parts must know."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from edgekv.bundle import SamplingSpec
from edgekv.errors import CheckpointError, UsageError
from edgekv.model_config import ModelConfig, NormKind, Norms, QKNorms, Values, read_json_object, read_model_config
from edgekv.settings import REPETITION_PENALTY, TEMPERATURE, TOP_K, TOP_P, Setting
from edgekv.spec import ModelSpec

from .rope import fold_rope

T = TypeVar("T")


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder's shape. ``rotated[l]`` is False where layer l has no position embedding (SmolLM3).

    The scales are those of :class:`~edgekv.model_config.ModelConfig`, and so is what is not said here; :mod:`edgekv.export.fold`
    puts them into weights.
    """

    model: ModelSpec
    rms_eps: float
    rotated: tuple[bool, ...]
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_cap: float = 0.0
    activation: str = "silu"
    norms: Norms = "before"
    norm_kind: NormKind = "rms"
    qk_norms: QKNorms = "none"
    gains_from_one: bool = False
    interleaved_rope: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused: tuple[str, ...] = ()
    text_part: bool = False

    @property
    def qk_norm_widths(self) -> dict[str, int]:
        """The channels that norms of queries and keys go over, by their names."""
        if self.qk_norms == "none":
            return {}
        heads = (self.model.n_q_heads, self.model.n_kv_heads) if self.qk_norms == "whole" else (1, 1)
        return {name: count * self.model.head_dim for name, count in zip(("q_norm", "k_norm"), heads, strict=True)}

    @property
    def residual_eps(self) -> float:
        """The epsilon of norms of the residual stream, which is ``embedding_scale`` times as small as the checkpoint's."""
        return self.rms_eps / self.embedding_scale**2


def read_config(folder: Path, context: int | None = None) -> DecoderConfig:
    """Read ``config.json`` and ``generation_config.json`` of a checkpoint folder.

    Args:
        context: see :func:`decoder_config`.

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
    return decoder_config(config, further, context)


#: What transformers takes for a setting that ``generation_config.json`` leaves out.
#: Source: transformers, GenerationConfig._get_default_generation_params.
SAMPLING_DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}


def read_sampling(folder: Path) -> SamplingSpec | None:
    """Read how a checkpoint's makers sample, in ``generation_config.json``; None: greedily, also without that file.

    As in transformers, ``do_sample`` switches the others on, but for the penalty, which greedy text has too.

    Raises:
        CheckpointError: a setting is out of its range; the message names it.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    values = Values(read_json_object(path), str(path), SAMPLING_DEFAULTS)

    def read(setting: Setting[T]) -> T:
        value = values.get(setting.name)
        try:
            return setting.check(SAMPLING_DEFAULTS[setting.name] if value is None else value)
        except UsageError as error:
            raise values.refusal(setting.name, f"it must be {setting.wanted}") from error

    spec = SamplingSpec(repetition_penalty=read(REPETITION_PENALTY))
    if values.get("do_sample") is not None and values.flag("do_sample"):
        spec = replace(spec, temperature=read(TEMPERATURE), top_k=read(TOP_K), top_p=read(TOP_P))
    return None if spec == SamplingSpec() else spec


#: Settings of generation_config.json that change an answer in transformers, by their values that change nothing there.
#: Source: transformers, GenerationConfig and GenerationMixin._get_logits_processor.
_CHANGES_NOTHING: dict[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": (None, []), "bad_words_ids": (None, []), "diversity_penalty": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0), "encoder_repetition_penalty": (None, 1), "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0), "exponential_decay_length_penalty": (None,), "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,), "guidance_scale": (None, 1), "min_length": (None, 0), "min_new_tokens": (None, 0),
    "min_p": (None, 0), "no_repeat_ngram_size": (None, 0), "num_beams": (None, 1), "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0), "sequence_bias": (None, [], {}), "stop_strings": (None, []), "suppress_tokens": (None, []),
    "top_h": (None,), "typical_p": (None, 1), "watermarking_config": (None,),
}  # fmt: skip
#: Those of them that only change which token is drawn, so that greedy answers do not know them.
_ONLY_DRAWN = ("epsilon_cutoff", "eta_cutoff", "min_p", "top_h", "typical_p")


def not_applied(folder: Path) -> dict[str, Any]:
    """Return what ``generation_config.json`` asks for that edgekv does not do, and that would change an answer, with its value.

    Raises:
        CheckpointError: the file is no JSON object.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    values = read_json_object(path)
    passed = () if values.get("do_sample") is True else _ONLY_DRAWN
    return {
        name: values[name]
        for name, nothing in _CHANGES_NOTHING.items()
        if name in values and values[name] not in nothing and name not in passed
    }


def decoder_config(config: ModelConfig, further_eos: tuple[int, ...] = (), context: int | None = None) -> DecoderConfig:
    """Turn a configuration into what the exporter needs.

    Args:
        further_eos: tokens that end a text besides those of the configuration.
        context: the most tokens of a text; None: as many as the model was made for.

    Raises:
        CheckpointError: the rope settings give angles that are not finite.
        UsageError: the context is above what the model was made for, or must be chosen and was not.
    """
    max_context = _context(config, context)
    rope, sliding_rope = fold_rope(config.rope, max_context), None
    if config.sliding_rope is not None:
        sliding_rope = fold_rope(config.sliding_rope, max_context)
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
        max_context=max_context,
        rope=rope,
        sliding_rope=None if sliding_rope == rope else sliding_rope,
        softmax_scale=config.softmax_scale,
        windows=config.windows,
        softcap=config.softcap,
        mlp_matrices=config.mlp_matrices,
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
        logits_cap=config.logits_cap,
        activation=config.activation,
        norms=config.norms,
        norm_kind=config.norm_kind,
        qk_norms=config.qk_norms,
        gains_from_one=config.gains_from_one,
        interleaved_rope=config.interleaved_rope,
        renamed=config.renamed,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        mlp_bias=config.mlp_bias,
        fused=config.fused,
        text_part=config.text_part,
    )


def _context(config: ModelConfig, context: int | None) -> int:
    """Settle the most tokens of a text.

    Keys are cached as they were rotated, so a bundle has one of longrope's sets of factors, and the one that fits is not in the
    checkpoint.
    """
    longest = config.max_context
    if context is not None and context > longest:
        raise UsageError(f"--context {context} is above what the model was made for, {longest}")
    if context is None and config.contexts:
        original, _ = config.contexts
        raise UsageError(
            f"this model has longrope factors for texts up to {original} tokens (original_max_position_embeddings)"
            f" and others for longer ones; choose with --context {original} or --context {longest}"
        )
    return context or longest
