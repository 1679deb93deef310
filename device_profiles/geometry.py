"""The shape of a decoder as the device model needs it: what is stored, what one token reads, what it leaves in the cache.

It needs no weights. What edgekv exports is read by :mod:`edgekv.model_config`; the keys of further models (mixtures of experts,
linear attention, MLPs of two matrices) are read here, for the published measurements that the device model is checked against.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekv.model_config import ARCHITECTURES, ModelConfig, Values, read_model_config, text_part
from edgekv.spec import ModelSpec

#: Architectures whose MLP has two matrices; all others have three (gate, up, down).
_UNGATED = (
    "bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt", "opt", "phi",
)  # fmt: skip
#: Architectures whose output head is the embedding unless the configuration says otherwise.
_TIED = ("bloom", "gpt2", "mpt", "opt")
#: Architectures whose sliding window is off unless ``use_sliding_window`` says otherwise.
_WINDOW_BY_SWITCH = ("qwen2_moe", "qwen3_moe")


@dataclass(frozen=True)
class LinearLayers:
    """Layers of linear attention (gated DeltaNet): a state of fixed size in the place of a cache.

    ``weights``: projections of one layer. ``state_bytes``: float32 state of one layer, read and written by every step.
    """

    count: int
    weights: int
    state_bytes: int

    @classmethod
    def from_config(cls, config: Values, hidden: int, n_layers: int) -> LinearLayers:
        """Read the keys of Qwen3-Next and Qwen3.5; models without them have no such layer.

        Raises:
            ConfigError: a number is missing; the message names it.
        """
        kinds = config.words("layer_types") or []
        every = config.count("full_attention_interval", default=1)
        count = kinds.count("linear_attention") if kinds else n_layers - n_layers // every
        if not count:
            return NO_LINEAR_LAYERS
        n_heads, n_key_heads = config.count("linear_num_value_heads"), config.count("linear_num_key_heads")
        values = n_heads * config.count("linear_value_head_dim")
        keys = n_key_heads * config.count("linear_key_head_dim")
        # Queries and keys, values and their gate, two numbers per head, the output.
        weights = hidden * (2 * keys + 2 * values + 2 * n_heads + values)
        return cls(count, weights, 4 * values * keys // n_key_heads)


NO_LINEAR_LAYERS = LinearLayers(0, 0, 0)


@dataclass(frozen=True)
class Geometry:
    """A decoder's shape.

    ``mlp_weights``: weights of one layer's MLP, all experts. ``mlp_active_weights``: those that one token multiplies with;
    ``mlp_shared_weights``: of a mixture of experts, those that every token reads (router, shared experts). ``windows`` has an
    entry per layer that attends: 0 for all tokens. ``linear`` counts the layers that do not.
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
    mlp_shared_weights: int = 0
    gated_attention: bool = False
    linear: LinearLayers = NO_LINEAR_LAYERS

    @property
    def n_kv_layers(self) -> int:
        """Layers that attend to a cache."""
        return self.n_layers - self.linear.count

    @property
    def attention_weights(self) -> int:
        """Weights of one attending layer's projections: queries, keys, values, output, and a gate in some models."""
        gate = self.n_q_heads if self.gated_attention else 0
        return self.hidden_size * self.head_dim * (2 * (self.n_q_heads + self.n_kv_heads) + gate)

    @property
    def mixing_weights(self) -> int:
        """Weights of all layers but their MLPs: the projections of attention, and of linear attention."""
        return self.n_kv_layers * self.attention_weights + self.linear.count * self.linear.weights

    @property
    def head_weights(self) -> int:
        """Weights of the output head; the embedding has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All weights, norms and biases left out."""
        embeddings = self.head_weights * (1 if self.tied_embeddings else 2)
        return self.mixing_weights + self.n_layers * self.mlp_weights + embeddings

    @classmethod
    def from_model(cls, model: ModelSpec | ModelConfig) -> Geometry:
        """Take the shape of a model that edgekv exports, from its bundle or its configuration."""
        mlp = model.mlp_matrices * model.hidden_size * model.intermediate_size
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
    def from_config(cls, config: object) -> Geometry:
        """Read a Hugging Face configuration (``config.json``), dense or mixture of experts, also one that edgekv does not export.

        Raises:
            ConfigError: a number is missing or makes no sense; the message names it.
        """
        values = text_part(Values(config, "config.json"))
        kind = values.get("model_type")
        if kind in ARCHITECTURES:
            return cls.from_model(read_model_config(values.config, values.source))
        n_layers = values.count("num_hidden_layers", "n_layers", "n_layer", "num_layers")
        hidden = values.count("hidden_size", "n_embd", "d_model")
        n_heads = values.count("num_attention_heads", "n_heads", "n_head")
        one_kv_head = kind == "falcon" and values.flag("multi_query")
        n_kv_heads = 1 if one_kv_head else values.count("num_key_value_heads", "n_kv_heads", default=n_heads)
        mlp, active, shared = _mlp(values, hidden, 2 if kind in _UNGATED else 3)
        linear = LinearLayers.from_config(values, hidden, n_layers)
        return cls(
            n_layers=n_layers,
            hidden_size=hidden,
            n_q_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=values.count("head_dim", default=hidden // n_heads),
            vocab_size=values.count("vocab_size"),
            max_context=values.count("max_position_embeddings", "n_positions", "max_seq_len", default=2048),
            mlp_weights=mlp,
            mlp_active_weights=active,
            windows=_windows(values, n_layers - linear.count),
            tied_embeddings=values.flag("tie_word_embeddings", default=kind in _TIED),
            mlp_shared_weights=shared,
            gated_attention=values.flag("attn_output_gate", default=kind == "qwen3_next"),
            linear=linear,
        )


def _mlp(values: Values, hidden: int, matrices: int) -> tuple[int, int, int]:
    """Return one layer's MLP weights: stored, read by one token, and of a mixture of experts what all tokens read."""
    experts = values.count("num_local_experts", "num_experts", "n_routed_experts", default=0)
    dense = values.count("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * hidden)
    if not experts:
        return matrices * hidden * dense, matrices * hidden * dense, 0
    width = values.count("moe_intermediate_size", default=dense)
    chosen = values.count("num_experts_per_tok", "num_experts_per_token", default=1)
    gated = values.count("shared_expert_intermediate_size", default=0)  # Qwen gates its shared expert with one row
    shared = gated or width * values.count("n_shared_experts", default=0)
    expert, common = matrices * hidden * width, hidden * (experts + matrices * shared + (1 if gated else 0))
    return common + experts * expert, common + chosen * expert, common


def _windows(values: Values, n_layers: int) -> tuple[int, ...]:
    window, kind = values.count("sliding_window", default=0), values.get("model_type")
    if kind in _WINDOW_BY_SWITCH and not values.flag("use_sliding_window"):
        window = 0
    kinds = values.words("layer_types")
    if kinds:
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds if kind != "linear_attention")
    every = values.count("sliding_window_pattern", default=0)
    return tuple(0 if every and (layer + 1) % every == 0 else window for layer in range(n_layers))
