"""Rotary settings in each of their spellings: ``rope_parameters``, ``rope_scaling``, and the keys beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgekv.errors import ConfigError
from edgekv.model_config.values import Values
from edgekv.schema import shown

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
#: What the settings of any type hold; transformers ignores what the chosen one does not read.
_KEYS = {
    "alpha", "attention_factor", "beta_fast", "beta_slow", "factor", "finetuned", "high_freq_factor",
    "llama_4_scaling_beta", "long_factor", "low_freq_factor", "max_position_embeddings", "mscale", "mscale_all_dim",
    "original_max_position_embeddings", "partial_rotary_factor", "rope_theta", "rope_type", "short_factor", "truncate",
    "type",
}  # fmt: skip


@dataclass(frozen=True)
class RopeSettings:
    """A rotary embedding: ``dim`` channels of a head are rotated.

    ``original_context``: positions before scaling (llama3, yarn, longrope). ``short_factor`` and ``long_factor`` [dim / 2] divide
    longrope's frequencies: in texts up to ``original_context``, and in longer ones. What a type does not read keeps its default.
    """

    kind: str
    theta: float
    dim: int
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def read_rope(
    values: Values, head_dim: int, max_context: int, *, partial: bool, types: Sequence[str] = ROPE_TYPES
) -> RopeSettings:
    """Read the rotary settings of a configuration. ``rope_scaling`` replaces ``rope_parameters``, as in transformers.

    Args:
        partial: the model type heeds ``partial_rotary_factor``.
        types: of rope that it takes.

    Raises:
        ConfigError: a rope type or a setting that edgekv does not decode, or one that is missing.
    """
    settings = values.part("rope_scaling" if values.get("rope_scaling") else "rope_parameters")
    return _read(_or_none(settings, values), values, head_dim, max_context, "rope_theta", partial, types)


def read_steady_context(values: Values) -> int:
    """Return the tokens behind which queries grow with their positions; 0: they never do.

    Source: transformers multiplies queries by ``1 + beta * log(1 + floor(position / original context))``, as Llama 4 does.

    Raises:
        ConfigError: the rope settings do not say it.
    """
    settings = values.part("rope_scaling" if values.get("rope_scaling") else "rope_parameters")
    assert settings is not None, "there is a default"
    for key in ("llama_4_scaling_beta", "original_max_position_embeddings"):
        if not settings.states(key):
            raise ConfigError(f"{settings.source}: this model type needs {key!r} and it is missing")
    original = settings.count("original_max_position_embeddings")
    return original if settings.number("llama_4_scaling_beta") else 0


def read_rope_by_layer_type(
    values: Values, head_dim: int, max_context: int, types: Sequence[str], sliding_theta: float
) -> tuple[RopeSettings, RopeSettings]:
    """Read the rotary settings of layers that see all tokens, and of those with a window.

    ``rope_parameters`` holds settings per layer type. Without it ``rope_scaling`` and ``rope_theta`` are of the former,
    ``rope_local_base_freq`` of the latter, or ``sliding_theta`` where the model type has no such key.

    Raises:
        ConfigError: a rope type or a setting that edgekv does not decode, or one that is missing.
    """
    by_type, scaling = _or_none(values.part("rope_parameters"), values), values.part("rope_scaling")
    stray = next((name for name in by_type.names() if name not in ("full_attention", "sliding_attention")), None)
    if stray is not None:
        raise ConfigError(f"{by_type.source} has {shown(stray)}; this model type has rope settings per layer type")
    if scaling is not None and values.get("rope_parameters") is not None:
        raise values.refusal("rope_scaling", "rope_parameters holds settings, too; keep those that are meant")
    if scaling is not None and scaling.states("type") and not scaling.states("rope_type"):
        raise scaling.refusal("type", "transformers reads rope_type here")
    whole = _or_none(by_type.part("full_attention") if scaling is None else scaling, values)
    sliding = _or_none(by_type.part("sliding_attention"), values)
    return (
        _read(whole, values, head_dim, max_context, "rope_theta", False, types),
        _read(sliding, values, head_dim, max_context, sliding_theta or "rope_local_base_freq", False, types),
    )


def _or_none(settings: Values | None, values: Values) -> Values:
    return Values({}, f"{values.source}: rope_parameters") if settings is None else settings


def _read(
    settings: Values,
    values: Values,
    head_dim: int,
    max_context: int,
    base: str | float,
    partial: bool,
    types: Sequence[str],
) -> RopeSettings:
    stray = next((key for key in settings.names() if key not in _KEYS), None)
    if stray is not None:
        why = "edgekv does not know this setting"
        if isinstance(settings.get(stray), Mapping):
            why = "a rope setting per layer type is not supported, edgekv exports models with one rope for all layers"
        raise ConfigError(f"{settings.source} has {shown(stray)}; {why}")
    kind = next((settings.get(key) for key in ("rope_type", "type") if settings.states(key)), "default")
    if kind == "su":
        kind = "longrope"  # what the first checkpoints of Phi-3 call it
    if not isinstance(kind, str) or kind not in types:
        raise ConfigError(
            f"{settings.source}: rope type {shown(kind)} is not supported; edgekv exports {', '.join(types)}"
        )
    for key in _NEEDED[kind]:
        if not settings.states(key):
            raise ConfigError(f"{settings.source}: rope type {kind!r} needs {key!r} and it is missing")
    # ``base``: its key beside the settings, or itself.
    where, key = (settings, "rope_theta") if settings.states("rope_theta") else (values, str(base))
    theta = where.number(key, above=0) if where is settings or isinstance(base, str) else base
    if kind == "yarn" and theta == 1:
        raise where.refusal(key, "yarn needs another base than 1")
    dim = _rotated_channels(settings, values, head_dim, partial=partial, whole=kind == "default")
    if kind == "default":
        return RopeSettings(kind, theta, dim)
    if kind == "dynamic":  # with an alpha, which stretches the base once and for all
        return RopeSettings("default", theta * settings.number("alpha", above=0) ** (dim / (dim - 2)), dim)
    if kind == "linear":
        return RopeSettings(kind, theta, dim, settings.number("factor", above=0))
    original_key = "original_max_position_embeddings"
    own = values.states(original_key) or values.get(original_key) is not None
    original = max_context
    if own or settings.states(original_key):
        original = (values if own else settings).count(original_key)
    if kind == "llama3":
        low, high = settings.number("low_freq_factor", above=0), settings.number("high_freq_factor", above=0)
        if low == high:
            raise settings.refusal("high_freq_factor", "it must differ from low_freq_factor")
        return RopeSettings(kind, theta, dim, settings.number("factor", above=0), original, low, high)
    if kind == "longrope":
        if head_dim != (width := values.count("hidden_size") // values.count("num_attention_heads")):
            raise ConfigError(
                f"{settings.source}: longrope is for heads of {width} channels here, and head_dim is {head_dim}"
            )
        return _read_longrope(settings, theta, dim, original, max_context)
    return _read_yarn(settings, theta, dim, original, max_context)


_NEEDED = {
    "default": (),
    "dynamic": ("alpha",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


def _rotated_channels(settings: Values, values: Values, head_dim: int, *, partial: bool, whole: bool) -> int:
    where = settings if settings.states("partial_rotary_factor") else values
    if where.get("partial_rotary_factor") is None or (whole and not partial):
        return head_dim
    dim = int(head_dim * where.number("partial_rotary_factor", above=0))
    if not partial and dim != head_dim:
        raise where.refusal("partial_rotary_factor", "this model type rotates all channels of a head")
    if not 2 <= dim <= head_dim or dim % 2:
        raise where.refusal("partial_rotary_factor", f"it leaves {dim} of {head_dim} channels; they must be even")
    return dim


def _read_yarn(settings: Values, theta: float, dim: int, original: int, max_context: int) -> RopeSettings:
    def above_zero(key: str, otherwise: float) -> float:
        return settings.number(key, above=0) if settings.get(key) else otherwise

    stated = settings.get("factor") is not None
    return RopeSettings(
        "yarn",
        theta,
        dim,
        settings.number("factor", above=0) if stated else max_context / original,
        original,
        attention_factor=None if settings.get("attention_factor") is None else settings.number("attention_factor"),
        beta_fast=above_zero("beta_fast", 32.0),
        beta_slow=above_zero("beta_slow", 1.0),
        mscale=above_zero("mscale", 0.0),
        mscale_all_dim=above_zero("mscale_all_dim", 0.0),
        truncate=bool(settings.get("truncate")) if settings.states("truncate") else True,
    )


def _read_longrope(settings: Values, theta: float, dim: int, original: int, max_context: int) -> RopeSettings:
    """Source: LongRoPE, arXiv 2402.13753; transformers writes the factor of attention from how much longer the context became."""
    short, long = (settings.numbers(key, dim // 2) for key in ("short_factor", "long_factor"))
    stated = settings.get("factor") is not None
    factor = settings.number("factor", above=0) if stated else max_context / original
    attention = None if settings.get("attention_factor") is None else settings.number("attention_factor", above=0)
    if attention is None and factor > 1 and original == 1:
        raise settings.refusal("original_max_position_embeddings", "longrope needs more than 1")
    return RopeSettings(
        "longrope", theta, dim, factor, original, attention_factor=attention, short_factor=short, long_factor=long
    )
