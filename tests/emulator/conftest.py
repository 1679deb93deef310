"""A bundle and a shape that are small enough to run often."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny(bundle: Callable[..., Path], checkpoint: Callable[[str], Path]) -> Path:
    """A bundle."""
    return bundle(checkpoint("llama"))


@pytest.fixture(scope="session")
def config_json() -> dict[str, Any]:
    """The ``config.json`` of a model that has no weights."""
    return {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1024,
        "vocab_size": 1000,
        "max_position_embeddings": 8192,
    }


@pytest.fixture(scope="session")
def config(config_json: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a file."""
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(config_json), encoding="utf-8")
    return path
