"""The shape of a decoder as the device model needs it: what is stored, what one token reads, what it leaves in the cache.

It is read from any Hugging Face configuration, of models that edgekv cannot export too, and needs no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgekv.errors import UsageError
from edgekv.spec import ModelSpec

#: Architectures whose MLP has two matrices; all others have three (gate, up, down).
_UNGATED = (
    "bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt", "opt", "phi", "starcoder2",
)  # fmt: skip
#: Architectures whose output head is the embedding unless the configuration says otherwise.
_TIED = ("bloom", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "mpt", "opt", "smollm3")
#: Architectures whose sliding window is off unless ``use_sliding_window`` says otherwise.
_WINDOW_BY_SWITCH = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3")


@dataclass(frozen=True)
class Geometry:
    """A decoder's shape.

    ``mlp_weights``: weights of one layer's MLP, all experts. ``mlp_active_weights``: those that one token multiplies with.
    ``windows[l]`` is 0 for full attention in layer l.
    """

    n_layers: int
    hidden_size: int
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    mlp_weights: int
    mlp_active_weights: int
    windows: tuple[int, ...]
    tied_embeddings: bool = False

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's four projections: queries, keys, values, output."""
        return 2 * self.hidden_size * self.head_dim * (self.n_q_heads + self.n_kv_heads)

    @property
    def head_weights(self) -> int:
        """Weights of the output head; the embedding has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All weights, norms and biases left out."""
        embeddings = self.head_weights * (1 if self.tied_embeddings else 2)
        return self.n_layers * (self.attention_weights + self.mlp_weights) + embeddings

    @classmethod
    def from_spec(cls, model: ModelSpec) -> Geometry:
        """Take the shape of a model that was exported."""
        mlp = 3 * model.hidden_size * model.intermediate_size
        return cls(
            n_layers=model.n_layers,
            hidden_size=model.hidden_size,
            n_q_heads=model.n_q_heads,
            n_kv_heads=model.n_kv_heads,
            head_dim=model.head_dim,
            vocab_size=model.vocab_size,
            max_context=model.max_context,
            mlp_weights=mlp,
            mlp_active_weights=mlp,
            windows=model.windows,
            tied_embeddings=model.tied_embeddings,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Geometry:
        """Read a Hugging Face configuration (``config.json``), dense or mixture of experts.

        Raises:
            UsageError: a number is missing; the message names it.
        """
        config = config.get("text_config") or config
        kind = str(config.get("model_type", ""))
        n_layers = _count(config, "num_hidden_layers", "n_layers", "n_layer", "num_layers")
        hidden = _count(config, "hidden_size", "n_embd", "d_model")
        n_heads = _count(config, "num_attention_heads", "n_heads", "n_head")
        one_kv_head = kind == "falcon" and config.get("multi_query")
        n_kv_heads = 1 if one_kv_head else _count(config, "num_key_value_heads", "n_kv_heads", default=n_heads)
        matrices = 2 if kind in _UNGATED else 3
        mlp, active = _mlp(config, hidden, matrices)
        return cls(
            n_layers=n_layers,
            hidden_size=hidden,
            n_q_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=_count(config, "head_dim", default=hidden // n_heads),
            vocab_size=_count(config, "vocab_size"),
            max_context=_count(config, "max_position_embeddings", "n_positions", "max_seq_len", default=2048),
            mlp_weights=mlp,
            mlp_active_weights=active,
            windows=_windows(config, kind, n_layers),
            tied_embeddings=bool(config.get("tie_word_embeddings", kind in _TIED)),
        )


def _count(config: Mapping[str, Any], *names: str, default: int = 0) -> int:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"config.json: {name} is {value!r}; it must be a positive whole number")
        return value
    if default:
        return default
    raise UsageError(f"config.json lacks {names[0]}; the plan needs the config.json of a Hugging Face decoder")


def _mlp(config: Mapping[str, Any], hidden: int, matrices: int) -> tuple[int, int]:
    """Return one layer's MLP weights: stored, and read by one token."""
    experts = config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts")
    dense = _count(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * hidden)
    if not experts:
        return (matrices * hidden * dense,) * 2
    width = _count(config, "moe_intermediate_size", default=dense)
    chosen = _count(config, "num_experts_per_tok", "num_experts_per_token", default=1)
    shared = config.get("shared_expert_intermediate_size") or width * int(config.get("n_shared_experts") or 0)
    router = hidden * experts
    return tuple(router + matrices * hidden * (shared + count * width) for count in (experts, chosen))  # type: ignore[return-value]


def _windows(config: Mapping[str, Any], kind: str, n_layers: int) -> tuple[int, ...]:
    window = config.get("sliding_window") or 0
    if kind in _WINDOW_BY_SWITCH and not config.get("use_sliding_window"):
        window = 0
    kinds = config.get("layer_types")
    if kinds:
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    # Gemma: every n-th layer sees the whole context (2 in Gemma 2, 6 in Gemma 3).
    every = config.get("sliding_window_pattern") or {"gemma2": 2, "gemma3": 6, "gemma3_text": 6}.get(kind, 0)
    return tuple(0 if every and (layer + 1) % every == 0 else window for layer in range(n_layers))
