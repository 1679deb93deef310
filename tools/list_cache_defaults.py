"""Write what left-out keys of a configuration mean for the shape of a cache: `python -m tools.list_cache_defaults`.

The source is the configuration classes of the installed transformers. A model type whose class computes its numbers in ways of
its own is listed as irregular: its file is refused, its object is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from edgekv.errors import ConfigError
from edgekv.model_config import ARCHITECTURES, cache_shape
from edgekv.model_config.cache_shape import CacheShape, read_cache_shape

FILE = Path(cache_shape.__file__).parent / cache_shape.DEFAULTS_FILE
KEYS = (
    *cache_shape.LAYERS, *cache_shape.HEADS, *cache_shape.KV_HEADS, *cache_shape.HEAD_DIM, *cache_shape.WIDTH,
    *cache_shape.UNEVEN, *cache_shape.SWITCHES, "v_head_dim", "is_encoder_decoder",
)  # fmt: skip


def main() -> None:
    """Write the file."""
    kinds = {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *texts().values()} - {*texts(), *ARCHITECTURES}
    keys = {kind: defaults(kind) for kind in sorted(kinds)}
    write(keys, [])
    write(keys, [kind for kind in keys if disagreement(kind)])


def write(keys: dict[str, dict[str, Any]], irregular: list[str]) -> None:
    """Write the table, a model type a line."""
    lines = [f"{json.dumps(kind)}: {json.dumps(found)}" for kind, found in keys.items() if kind not in irregular]
    parts = ['"keys": {\n' + ",\n".join(lines) + "\n}", f'"texts": {json.dumps(texts(), indent=1, sort_keys=True)}']
    FILE.write_text("{" + ",\n".join([*parts, f'"irregular": {json.dumps(irregular)}']) + "}\n", encoding="utf-8")
    cache_shape.defaults_table.cache_clear()


def defaults(kind: str) -> dict[str, Any]:
    """Return what left-out keys of a model type mean, without those that have no value."""
    stated = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[kind])}
    return {key: stated[key] for key in KEYS if isinstance(stated.get(key), int) and stated[key] is not False}


def texts() -> dict[str, str]:
    """Return the type of the part that writes text, by the type of the configuration around it."""
    composed = {
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    parts = {kind: CONFIG_MAPPING[kind].sub_configs_defaults.get("text_config") for kind in sorted(composed)}
    return {
        kind: part.model_type for kind, part in parts.items() if part is not None and part.model_type in CONFIG_MAPPING
    }


def disagreement(kind: str) -> str:
    """Say which key, left out, means something else here than in transformers; nothing where all agree."""
    for key, config in partial_configs(kind):
        theirs: CacheShape | None = None
        with contextlib.suppress(ConfigError):
            theirs = read_cache_shape(CONFIG_MAPPING[kind].from_dict(dict(config)))
        ours: CacheShape | None = None
        with contextlib.suppress(ConfigError):
            ours = read_cache_shape(config)
        if ours is not None and ours != theirs:
            return f"{kind} without {key}: {ours}, in transformers {theirs}"
    return ""


def partial_configs(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield configurations of a type: nothing stated, and all keys but one, with numbers that are not the defaults."""
    yield "any key", {"model_type": kind}
    with contextlib.suppress(Exception):  # a type whose default is not allowed has nothing to leave out
        full = CONFIG_MAPPING[kind]().to_dict()
        stated = [key for key in KEYS if isinstance(full.get(key), int) and full[key] is not True]
        for left_out in stated:
            config = {key: full[key] * 2 for key in stated if key != left_out and key not in cache_shape.LAYERS}
            layers = {key: full[key] for key in stated if key != left_out and key in cache_shape.LAYERS}
            CONFIG_MAPPING[kind].from_dict({"model_type": kind, **config, **layers})
            yield left_out, {"model_type": kind, **config, **layers}


if __name__ == "__main__":
    main()
