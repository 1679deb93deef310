"""What a configuration means: read by edgekv, and by the decoder that transformers builds from it (on the meta device)."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from edgekv.export.checkpoint import HEAD, expected_shapes
from edgekv.export.config import decoder_config
from edgekv.model_config import ARCHITECTURES, read_model_config


@dataclass
class Meaning:
    """Everything that shapes a decoder. ``shapes`` names the tensors that are not tied to another one.

    ``ropes``: of each layer its frequencies and what multiplies cosine and sine. ``activation``: of 1.
    """

    shapes: dict[str, tuple[int, ...]]
    windows: tuple[int, ...]
    rotated: tuple[bool, ...]
    ropes: tuple[tuple[tuple[float, ...], float], ...]
    activation: float
    softmax_scale: float
    embedding_scale: float
    residual_scale: float
    logits_scale: float
    softcap: float
    logits_cap: float
    rms_eps: float
    bos: int | None
    eos: tuple[int, ...]


ACTIVATIONS = {
    "silu": float(F.silu(torch.ones(1))),
    "gelu_tanh": float(F.gelu(torch.ones(1), approximate="tanh")),
    "relu2": 1.0,
}


def read_by_edgekv(config: dict[str, Any]) -> Meaning:
    """Return what edgekv reads; raises ConfigError."""
    read = decoder_config(read_model_config(config))
    model = read.model
    layers = [model.ropes[model.rope_of(layer)] for layer in range(model.n_layers)]
    return Meaning(
        shapes=expected_shapes(read),
        windows=model.windows,
        rotated=read.rotated,
        ropes=tuple((rope.inv_freq, rope.attention_scaling) for rope in layers),
        activation=ACTIVATIONS[read.activation],
        softmax_scale=model.softmax_scale,
        embedding_scale=read.embedding_scale,
        residual_scale=read.residual_scale,
        logits_scale=read.logits_scale,
        softcap=model.softcap,
        logits_cap=read.logits_cap,
        rms_eps=read.rms_eps,
        bos=model.bos_token_id,
        eos=model.eos_token_ids,
    )


def built_by_transformers(given: dict[str, Any]) -> Meaning:
    """Return what transformers builds; raises whatever it raises."""
    kind = given["model_type"]
    config = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(given))
    config.pad_token_id = None  # an id of the default vocabulary need not fit this one, and pads nothing here
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    attentions = [layer.self_attn for layer in model.model.layers]
    mlp = model.model.layers[0].mlp
    activation = next(getattr(mlp, name) for name in ("activation_fn", "act_fn", "act") if hasattr(mlp, name))
    shapes = _apart({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, config)
    if model.lm_head.weight is model.model.embed_tokens.weight:
        del shapes[HEAD]
    rope, embedding, norm = type(model.model.rotary_emb)(config), model.model.embed_tokens, model.model.norm
    kinds = [f"{kind}_" for kind in config.layer_types] if isinstance(rope.rope_type, dict) else [""] * len(attentions)
    tokens = config.eos_token_id
    ends = tokens if isinstance(tokens, list) else [tokens]
    vocabulary = range(config.vocab_size)  # an id outside it can be neither fed nor come up
    return Meaning(
        shapes=shapes,
        windows=_windows(model),
        rotated=tuple(_rotates(attention) for attention in attentions),
        ropes=tuple(
            (tuple(getattr(rope, f"{kind}inv_freq").tolist()), float(getattr(rope, f"{kind}attention_scaling")))
            for kind in kinds
        ),
        activation=float(activation(torch.ones(1))),
        softmax_scale=attentions[0].scaling,
        embedding_scale=getattr(model.model, "embedding_multiplier", getattr(embedding, "scalar_embed_scale", 1.0)),
        residual_scale=getattr(model.model.layers[0], "residual_multiplier", 1.0),
        # Read by the model with the head, which keeps no copy; a class without the key has it as a stray one.
        logits_scale=_logits_scale(kind, config),
        softcap=getattr(attentions[0], "attn_logit_softcapping", None) or 0.0,
        logits_cap=(config.final_logit_softcapping or 0.0) if _has(kind, "final_logit_softcapping") else 0.0,
        rms_eps=norm.eps if hasattr(norm, "eps") else norm.variance_epsilon,
        bos=config.bos_token_id if config.bos_token_id in vocabulary else None,
        eos=tuple(token for token in ends if token in vocabulary),
    )


def _logits_scale(kind: str, config: Any) -> float:
    if _has(kind, "logit_scale"):
        return float(config.logit_scale)
    return 1 / config.logits_scaling if _has(kind, "logits_scaling") else 1.0


def _has(kind: str, key: str) -> bool:
    """Whether the configuration class has a key: any other becomes an attribute of its object, too."""
    return key in {field.name for field in dataclasses.fields(CONFIG_MAPPING[kind])}


def _rotates(attention: Any) -> bool:
    if type(attention).__name__ == "Cohere2Attention":
        return attention.sliding_window is not None
    if type(attention).__name__ == "Exaone4Attention":
        return attention.sliding_window is None or bool(attention.is_sliding)
    return bool(getattr(attention, "use_rope", True))


def _apart(shapes: dict[str, tuple[int, ...]], config: Any) -> dict[str, tuple[int, ...]]:
    """Name the parts of tensors that are one, and those that have other names in most model types."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    result: dict[str, tuple[int, ...]] = {}
    renamed = dict(ARCHITECTURES[config.model_type].renamed)
    for stored, shape in shapes.items():
        part = re.match(r"(model\.layers\.\d+\.)(.+)(\.\w+)$", stored)
        name = f"{part[1]}{renamed.get(part[2], part[2])}{part[3]}" if part else stored
        parts = {name: shape}
        if ".qkv_proj." in name:
            parts = {
                name.replace("qkv", kind): (count * width, shape[1]) for kind, count in zip("qkv", heads, strict=True)
            }
        elif ".gate_up_proj." in name:
            parts = {name.replace("gate_up", kind): (config.intermediate_size, shape[1]) for kind in ("gate", "up")}
        assert sum(part[0] for part in parts.values()) == shape[0]
        result |= parts
    return result


def _windows(model: Any) -> tuple[int, ...]:
    """Run the decoder with layers that do nothing and see which mask each of them is given."""
    module = importlib.import_module(type(model).__module__)
    seen: list[int] = []

    def sliding(config: Any, **_: Any) -> int:
        if config.sliding_window is None:
            raise ValueError("a sliding layer without a window")
        return int(config.sliding_window)

    def layer(hidden: torch.Tensor, *, attention_mask: int, **_: Any) -> torch.Tensor:
        seen.append(attention_mask)
        return hidden

    masks = {"create_causal_mask": lambda **_: 0, "create_sliding_window_causal_mask": sliding}
    kept = {name: getattr(module, name) for name in masks if hasattr(module, name)}
    try:
        for name in kept:
            setattr(module, name, masks[name])
        for block in model.model.layers:
            block.forward = layer
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device="meta"), use_cache=False)
    finally:
        for name, function in kept.items():
            setattr(module, name, function)
    # Eager attention heeds the mask alone; an attention that says otherwise would differ between implementations.
    for block, window in zip(model.model.layers, seen, strict=True):
        says = getattr(block.self_attn, "is_sliding", True) and hasattr(block.self_attn, "sliding_window")
        own = block.self_attn.sliding_window if says else window
        assert type(model).__name__.startswith("Mistral") or (own or 0) == window, "transformers disagrees with itself"
    return tuple(seen)
