"""A decoder that edgekv exports, from its configuration.

Invariant: what :func:`read_model_config` returns can be exported; everything that cannot is refused here, by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgekv.errors import ConfigError
from edgekv.model_config.architectures import ARCHITECTURES, TEXT_PARTS, Architecture, NormKind, Norms, QKNorms
from edgekv.model_config.rope import RopeSettings, read_rope, read_rope_by_layer_type, read_steady_context
from edgekv.model_config.values import MAX_COUNT, MAX_LAYERS, Values
from edgekv.schema import shown
from edgekv.spec import MAX_HEAD_DIM

#: Activations by their names in transformers, of an MLP with a gate and of one without.
_GATED = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_UNGATED = {"relu2": "relu2", "gelu_pytorch_tanh": "gelu_tanh"}
#: The names that model types have for the epsilon of their norms.
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon")
_LAYER_TYPES = ("full_attention", "sliding_attention")
#: Scalars that multiply what a model computes: none has one below, or above one over it. Folded, they stay far from the ends of
#: float32.
_LEAST_SCALE = 1e-4


@dataclass(frozen=True)
class ModelConfig:
    """What a configuration says of a decoder. ``windows[l]`` is 0 for full attention in layer l; ``rotated[l]`` False: no RoPE.

    ``max_context``: positions, those that YaRN adds included. ``bos_token_id`` is None where it lies outside the vocabulary.
    ``text_part``: the checkpoint is of a model that does more than write text, this is its decoder. ``rope`` is of all
    layers, or of those without a window where ``sliding_rope`` is set. ``activation``: ``silu``, ``gelu_tanh`` (GELU in its
    tanh approximation), or ``relu2`` (the square of what is above 0). ``mlp_matrices``: 3 with a gate, 2 without. ``norms``,
    ``norm_kind``, ``qk_norms``, ``gains_from_one``, ``interleaved_rope``, ``renamed`` and ``fused`` are those of the
    architecture. ``softmax_scale`` multiplies the scores, ``embedding_scale`` the rows of the embedding, ``residual_scale``
    what attention and MLP add to the residual stream, ``logits_scale`` the logits. ``softcap`` and ``logits_cap``: what the
    tanh of scores and logits leads to; 0: they go through none.
    """

    architecture: str
    n_layers: int
    hidden_size: int
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    rms_eps: float
    rope: RopeSettings
    sliding_rope: RopeSettings | None
    softmax_scale: float
    embedding_scale: float
    residual_scale: float
    logits_scale: float
    softcap: float
    logits_cap: float
    windows: tuple[int, ...]
    rotated: tuple[bool, ...]
    activation: str
    norms: Norms
    norm_kind: NormKind
    qk_norms: QKNorms
    gains_from_one: bool
    interleaved_rope: bool
    renamed: tuple[tuple[str, str], ...]
    mlp_matrices: Literal[3, 2]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    fused: tuple[str, ...]
    text_part: bool
    tied_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def contexts(self) -> tuple[int, ...]:
        """The contexts between which an export must choose, the smaller one first; none where it need not.

        longrope has one set of factors for texts up to the original context and another for longer ones.
        """
        original = self.rope.original_context
        return (original, self.max_context) if self.rope.kind == "longrope" and original < self.max_context else ()


def read_model_config(config: object, source: str = "config.json") -> ModelConfig:
    """Read the configuration of a model that edgekv exports.

    Args:
        config: what ``config.json`` holds.
        source: the name of the file, for messages.

    Raises:
        ConfigError: a model type or a setting that edgekv does not decode, or a value that makes no sense.
    """
    outer = Values(config, source)
    kind = outer.get("model_type")
    known = [*ARCHITECTURES, *TEXT_PARTS]
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(f"{source}: unknown architecture {shown(kind)}; edgekv exports {', '.join(known)}")
    _refuse_what_is_not_decoded(outer)
    everything, inner = _text_part(outer, TEXT_PARTS[kind]) if kind in TEXT_PARTS else (outer, kind)
    page = ARCHITECTURES[inner]
    source = everything.source
    values = Values(everything.config, source, page.defaults)
    missing = next((key for key in page.required if values.get(key) is None), None)
    if missing is not None:
        raise values.refusal(missing, "this model type needs it")
    activation = _activation(values, page)
    _refuse_later_tokens(values)
    if values.flag("qk_layernorm"):
        raise values.refusal("qk_layernorm", "edgekv exports decoders of this type without norms of queries and keys")
    n_layers = values.count("num_hidden_layers", most=MAX_LAYERS)
    hidden, n_heads = values.count("hidden_size"), values.count("num_attention_heads")
    if page.heads_divide_width and hidden % n_heads:
        raise values.refusal("hidden_size", f"it must be a multiple of num_attention_heads ({n_heads})")
    n_kv_heads = _optional_count(values, page, "num_key_value_heads") or n_heads
    if n_heads % n_kv_heads:
        raise values.refusal("num_key_value_heads", f"it must divide num_attention_heads ({n_heads})")
    head_dim = _optional_count(values, page, "head_dim") or hidden // n_heads
    if page.heads_fill_width and head_dim * n_heads != hidden:
        raise values.refusal("head_dim", f"hidden_size {hidden} and num_attention_heads {n_heads} say otherwise")
    if head_dim % 4 or not 4 <= head_dim <= MAX_HEAD_DIM:
        raise ConfigError(
            f"{source}: head_dim {head_dim} is not supported; pages need a multiple of 4, at most {MAX_HEAD_DIM}"
        )
    rotated = _rotated(values, page, n_layers)
    vocab_size, max_context = values.count("vocab_size"), values.count("max_position_embeddings")
    if page.defaults.get("original_max_position_embeddings") is not None:  # a number even where no rope type reads it
        _optional_count(values, page, "original_max_position_embeddings")
    sliding_rope = None
    if page.sliding_rope:
        rope, sliding_rope = read_rope_by_layer_type(values, head_dim, max_context, page.rope_types, page.sliding_theta)
    else:
        rope = read_rope(values, head_dim, max_context, partial=page.partial_rotary, types=page.rope_types)
    if rope.kind == "yarn":  # many configurations state the length before the scaling
        max_context = max(max_context, min(int(rope.original_context * rope.factor), MAX_COUNT))
    if page.growing_queries:
        max_context = min(max_context, read_steady_context(values) or max_context)
    bos = None if values.get("bos_token_id") is None else values.whole("bos_token_id")
    windows = _windows(values, everything, page, rotated)
    if page.unrotated_full and values.get("sliding_window") is not None:
        rotated = tuple(window > 0 for window in windows)
    ends = outer if outer.states("eos_token_id") else values
    use_bias = values.flag("use_bias")
    attention_bias = use_bias or values.flag("attention_bias")
    return ModelConfig(
        architecture=kind,
        n_layers=n_layers,
        hidden_size=hidden,
        n_q_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        intermediate_size=values.count("intermediate_size"),
        vocab_size=vocab_size,
        max_context=max_context,
        rms_eps=values.number(next(key for key in _EPSILONS if key in page.defaults), above=0),
        rope=rope,
        sliding_rope=sliding_rope,
        softmax_scale=_softmax_scale(values, page, head_dim),
        embedding_scale=hidden**0.5 if page.scaled_embedding else _scale(values, page, "embedding_multiplier"),
        residual_scale=_scale(values, page, "residual_multiplier"),
        logits_scale=_scale(values, page, "logit_scale") / _scale(values, page, "logits_scaling"),
        softcap=_cap(values, "attn_logit_softcapping"),
        logits_cap=_cap(values, "final_logit_softcapping"),
        windows=windows,
        rotated=rotated,
        activation=activation,
        norms="shared" if values.flag("use_parallel_residual") else page.norms,
        norm_kind=page.norm_kind,
        qk_norms=page.qk_norms,
        gains_from_one=page.gains_from_one,
        interleaved_rope=page.interleaved_rope,
        renamed=page.renamed,
        mlp_matrices=3 if page.gated else 2,
        qkv_bias=page.qkv_bias or attention_bias or values.flag("use_qkv_bias"),
        output_bias=values.flag("attention_out_bias", default=attention_bias and page.output_bias),
        mlp_bias=use_bias or values.flag("mlp_bias"),
        fused=page.fused,
        text_part=kind in TEXT_PARTS,
        # Of several models in one, the outer configuration says it, and it is true where that says nothing.
        tied_embeddings=(outer if kind in TEXT_PARTS else values).flag(
            "tie_word_embeddings", default=kind in TEXT_PARTS
        ),
        bos_token_id=bos if bos is not None and 0 <= bos < vocab_size else None,
        eos_token_ids=page.ends if ends.get("eos_token_id") is None else ends.token_ids("eos_token_id"),
    )


def _text_part(outer: Values, kinds: Sequence[str]) -> tuple[Values, str]:
    """Return the settings of the decoder in a model that does more than write text, and its type, one of ``kinds``."""
    part = outer.part("text_config")
    if part is None:
        raise ConfigError(f"{outer.source} lacks text_config; a model of this type has its decoder there")
    kind = part.get("model_type") if part.states("model_type") or len(kinds) > 1 else kinds[0]
    if not isinstance(kind, str) or kind not in kinds:
        raise part.refusal("model_type", f"edgekv knows {' and '.join(kinds)} here")
    _refuse_what_is_not_decoded(part)
    tied = "tie_word_embeddings"
    inner = part.get(tied) if part.states(tied) else ARCHITECTURES[kind].defaults[tied]
    # Mistral 3 writes False here beside the True that counts.
    if len(kinds) == 1 and (outer.get(tied) if outer.states(tied) else True) != inner:
        raise outer.refusal(tied, f"text_config says {shown(inner)}")
    return part, kind


def _activation(values: Values, page: Architecture) -> str:
    key = "hidden_act" if "hidden_act" in page.defaults else "hidden_activation"
    name, known = values.get(key), _GATED if page.gated else _UNGATED
    if page.tanh_gelu and name == "gelu":
        name = "gelu_pytorch_tanh"
    if not isinstance(name, str) or name not in known:
        raise values.refusal(key, f"this activation is not supported, edgekv exports {', '.join(known)}")
    return known[name]


def _cap(values: Values, key: str) -> float:
    """Return what a tanh leads to; 0: there is none."""
    if values.get(key) is None:
        return 0.0
    cap = values.number(key, above=0)
    if not _LEAST_SCALE <= cap <= 1 / _LEAST_SCALE:
        raise values.refusal(key, f"edgekv exports caps from {_LEAST_SCALE:g} to {1 / _LEAST_SCALE:g}")
    return cap


def _refuse_later_tokens(values: Values) -> None:
    if values.get("use_bidirectional_attention") is not None and values.flag("use_bidirectional_attention"):
        raise values.refusal("use_bidirectional_attention", "edgekv exports decoders that see no later tokens")


def _softmax_scale(values: Values, page: Architecture, head_dim: int) -> float:
    if "query_pre_attn_scalar" in page.defaults:
        return float(values.count("query_pre_attn_scalar") ** -0.5)
    return _scale(values, page, "attention_multiplier", head_dim**-0.5)


def _refuse_what_is_not_decoded(everything: Values) -> None:
    if everything.get("quantization_config"):
        raise ConfigError(
            f"{everything.source}: the checkpoint is already quantised (quantization_config); export the original one with"
            " --weights int4"
        )
    if everything.get("is_encoder_decoder"):
        raise everything.refusal("is_encoder_decoder", "edgekv exports decoders alone")
    if everything.get("transformers_weights") is not None:
        raise everything.refusal("transformers_weights", "edgekv reads model.safetensors or its index")
    if everything.get("per_layer_config"):
        raise everything.refusal("per_layer_config", "edgekv exports decoders whose layers are alike")


def _optional_count(values: Values, page: Architecture, key: str) -> int | None:
    """Return a count, or None where null or a left-out key means that there is none."""
    if values.get(key) is not None:
        return values.count(key)
    if page.defaults[key] is None or key in page.nullable:
        return None
    raise values.refusal(key, "it must be a positive whole number; leave the key out for the default")


def _scale(values: Values, page: Architecture, key: str, otherwise: float = 1.0) -> float:
    """Return a number that multiplies what the model computes; ``otherwise`` where the model type has none."""
    if key not in page.defaults:
        return otherwise
    scale = values.number(key, above=0)
    if not _LEAST_SCALE <= scale <= 1 / _LEAST_SCALE:
        raise values.refusal(key, f"edgekv folds it into weights, from {_LEAST_SCALE:g} to {1 / _LEAST_SCALE:g}")
    return scale


def _rotated(values: Values, page: Architecture, n_layers: int) -> tuple[bool, ...]:
    if "no_rope_layers" not in page.defaults:
        return (True,) * n_layers
    flags = values.wholes("no_rope_layers")
    if flags is not None:
        if len(flags) < n_layers:
            raise values.refusal("no_rope_layers", f"it must have an entry for each of the {n_layers} layers")
        return tuple(bool(flag) for flag in flags[:n_layers])
    interval = values.whole("no_rope_layer_interval")
    if interval == 0:
        raise values.refusal("no_rope_layer_interval", "it must not be 0")
    return tuple((layer + 1) % interval != 0 for layer in range(n_layers))


def _windows(values: Values, everything: Values, page: Architecture, rotated: Sequence[bool]) -> tuple[int, ...]:
    by_switch, by_type = page.windows in ("late", "unrotated"), page.windows not in ("none", "every")
    size = 0
    if page.windows in ("every", "any", "pattern") or (by_switch and values.flag("use_sliding_window")):
        size = _optional_count(values, page, "sliding_window") or 0
    kinds = everything.words("layer_types")
    if page.windows == "late":
        first = values.whole("max_window_layers")
        windows = tuple(size if layer >= first else 0 for layer in range(len(rotated)))
    elif page.windows == "pattern" and kinds is None:
        every = page.window_period or values.whole("sliding_window_pattern")
        if every == 0:
            raise values.refusal("sliding_window_pattern", "it must not be 0")
        windows = tuple(size if (layer + 1) % every else 0 for layer in range(len(rotated)))
    elif page.windows == "unrotated":
        windows = tuple(0 if turned else size for turned in rotated)
    else:
        windows = (size,) * len(rotated)
    if kinds is None:
        if page.windows == "pattern" and not size:
            raise values.refusal("sliding_window", "layer_types must say then that no layer has a window")
        return windows
    if len(kinds) != len(rotated) or set(kinds) - set(_LAYER_TYPES):
        raise everything.refusal(
            "layer_types",
            f"edgekv exports {' and '.join(_LAYER_TYPES)}, one entry for each of the {len(rotated)} layers",
        )
    stated = tuple(size if kind == "sliding_attention" else 0 for kind in kinds)
    if not size and "sliding_attention" in kinds:
        raise everything.refusal("layer_types", "without a sliding_window that is in use, no layer can slide")
    if not by_type and stated != windows:
        raise everything.refusal("layer_types", "all layers of this model type have the same window")
    return stated
