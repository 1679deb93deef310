"""Shared fixtures: bundles are exported once per session; the user's own folders are never touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgekv as edgekv  # first: it keeps the engines that tests load from reporting home
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Send cache and configuration to a temporary folder."""
    home = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    patch.setenv("XDG_CONFIG_HOME", str(home / "config"))


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that exports a source once per session and gives the bundle's folder."""
    from edgekv.export import export_model

    made: dict[tuple[object, ...], Path] = {}

    def get(
        source: str | Path,
        form: str = "split",
        weights: str = "fp32",
        page_size: int = 16,
        engine: str = "onnx",
        operators: str | None = None,
    ) -> Path:
        key = (str(source), form, weights, page_size, engine, operators)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bundle") / "model.edgekv"
            export_model(
                source,
                made[key],
                engine=engine,
                form=form,
                weights=weights,
                page_size=page_size,
                operators=operators,
                calibration="none",
            )
        return made[key]

    return get


#: Each row is one way in which decoders differ.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "qwen2-bias": ("qwen2", {}),
    "qwen3-qk-norm": ("qwen3", {"tie_word_embeddings": True}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes the checkpoint of a variant once per session."""
    made: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in made:
            family, changes = VARIANTS[variant]
            made[variant] = make_checkpoint(tmp_path_factory.mktemp(variant), family, std=0.04, **changes)
        return made[variant]

    return get
