"""The shape of the keys and values that a model keeps, of any model with attention: exported by edgekv or not.

``cache_defaults.json`` beside this file has, for the model types of transformers that edgekv does not export, what keys that are
left out mean (``tools/list_cache_defaults.py`` writes it).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from edgekv.errors import ConfigError
from edgekv.model_config.architectures import ARCHITECTURES
from edgekv.model_config.values import MAX_COUNT, MAX_LAYERS, Values, text_part
from edgekv.schema import shown

DEFAULTS_FILE = "cache_defaults.json"
#: The names that model types have for one number, Hugging Face's first.
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads")
HEAD_DIM = ("head_dim", "attention_head_dim", "kv_channels", "dim_head")
WIDTH = ("hidden_size", "n_embd", "d_model")
#: Keys of models whose layers, or whose keys and values, are not of one size.
UNEVEN = (
    "kv_lora_rank", "global_head_dim", "swa_head_dim", "swa_num_key_value_heads", "per_layer_config", "block_configs"
)  # fmt: skip
#: Model types that keep states of other kinds alone.
_NO_ATTENTION = ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm")
#: Switches that change the number of KV heads.
SWITCHES = ("multi_query", "new_decoder_architecture", "multi_query_attention")


@dataclass(frozen=True)
class CacheShape:
    """Keys of one token are [n_layers, n_kv_heads, head_dim], and so are its values."""

    n_layers: int
    n_kv_heads: int
    head_dim: int


def read_cache_shape(config: object, source: str = "model_config") -> CacheShape:
    """Read the configuration of any model: also of several models in one, and with short names like ``num_kv_heads``.

    Args:
        config: a mapping, a configuration of transformers, or an object with the keys as attributes.

    Raises:
        ConfigError: a number is missing or makes no sense, or keys and values are not of one size; the message names the key.
    """
    table = defaults_table()
    explicit = not isinstance(config, Mapping) and callable(getattr(config, "to_dict", None))
    if explicit:
        config = config.to_dict()  # type: ignore[attr-defined]  # what an object of transformers says of itself
    outer = Values(config, source)
    inner = text_part(outer)
    kind = _word(inner, "model_type")
    if inner is not outer:
        kind = kind or table["texts"].get(_word(outer, "model_type"))
    elif kind in table["texts"]:  # older files have the decoder's keys beside those of the others
        if not any(outer.states(key) for key in LAYERS):
            raise ConfigError(f"{source} lacks text_config; a model of type {kind} has its decoder there")
        kind = table["texts"][kind]
    if kind in _NO_ATTENTION:
        raise ConfigError(f"{source}: models of type {kind} have no attention, and so no keys and values")
    if kind in table["irregular"] and not explicit:
        raise ConfigError(
            f"{source}: a file does not tell the shape of a {kind} model; give transformers' object, from AutoConfig"
        )
    known = ARCHITECTURES[kind].defaults if kind and kind in ARCHITECTURES else table["keys"].get(kind, {})
    numbers = _Numbers(inner, known)
    if numbers.get("is_encoder_decoder"):
        raise ConfigError(f"{inner.source}: is_encoder_decoder is true; the cache is for models that only decode")
    for key in UNEVEN:
        if numbers.get(key):
            raise ConfigError(
                f"{inner.source}: {key} is {shown(numbers.get(key))}: keys and values of this model are not of one size, and"
                " those of the cache are"
            )
    n_heads, n_kv_heads = numbers.find(HEADS), _kv_heads(numbers)
    if n_kv_heads is None:
        n_kv_heads = numbers.need((*HEADS, *KV_HEADS))
    if n_heads is not None and n_heads % n_kv_heads:
        raise ConfigError(
            f"{inner.source}: {n_kv_heads} KV heads ({KV_HEADS[0]}) do not divide {n_heads} query heads ({HEADS[0]})"
        )
    head_dim = numbers.find(HEAD_DIM)
    if head_dim is None:
        head_dim = numbers.need((*WIDTH, *HEAD_DIM)) // numbers.need(HEADS)
    values = numbers.find(("v_head_dim",))
    if values not in (None, head_dim):
        raise ConfigError(
            f"{inner.source}: v_head_dim is {values}, and keys have {head_dim} channels; the cache has one size"
        )
    return CacheShape(numbers.need(LAYERS), n_kv_heads, head_dim)


def _word(values: Values, key: str) -> str | None:
    value = values.get(key)
    return value if isinstance(value, str) else None


class _Numbers:
    """What a configuration states, and what its model type means by what is left out."""

    def __init__(self, values: Values, defaults: Mapping[str, Any]) -> None:
        self._values = values
        self._defaults = defaults

    def get(self, key: str) -> object:
        """Return what a key holds or means."""
        return self._values.get(key) if self._values.states(key) else self._defaults.get(key)

    def find(self, keys: Sequence[str]) -> int | None:
        """Return the number that goes by one of these names; None: null, or nothing says."""
        stated = [key for key in keys if self._values.states(key)]
        for key in stated:
            if self._values.get(key) is not None:
                return self._values.count(key, most=MAX_LAYERS if key in LAYERS else MAX_COUNT)
        return None if stated else next((n for key in keys if (n := self._defaults.get(key)) is not None), None)

    def need(self, keys: Sequence[str]) -> int:
        """Return the number that goes by one of these names.

        Raises:
            ConfigError: there is none.
        """
        number = self.find(keys)
        if number is None:
            raise ConfigError(f"{self._values.source} has none of {', '.join(keys)}")
        return number

    def part(self, key: str) -> _Numbers | None:
        """Return the numbers of a part, if the configuration has it."""
        part = self._values.part(key)
        return None if part is None else _Numbers(part, {})


def _kv_heads(numbers: _Numbers) -> int | None:
    if numbers.get("multi_query") and not numbers.get("new_decoder_architecture"):  # Falcon, GPTBigCode
        return 1
    if numbers.get("multi_query_attention"):  # ChatGLM
        return numbers.need(("multi_query_group_num",))
    attention = numbers.part("attn_config")  # DBRX, MPT
    found = attention.find(KV_HEADS) if attention is not None else None
    return found if found is not None else numbers.find(KV_HEADS)


@functools.cache
def defaults_table() -> dict[str, Any]:
    """Return the table of defaults.

    ``keys``: what left-out keys mean, by model type. ``texts``: the type of the part that writes text, by the type around it.
    ``irregular``: types whose classes compute the numbers from others.
    """
    table: dict[str, Any] = json.loads(
        (resources.files("edgekv.model_config") / DEFAULTS_FILE).read_text(encoding="utf-8")
    )
    return table
