"""The model of a plan: a bundle, a Hugging Face folder, or a bare ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgekv.bundle import MANIFEST, read_manifest
from edgekv.contract import ENGINES, FORMS, PAGE_SIZE, WEIGHTS, default_weights
from edgekv.device_profiles.geometry import Geometry
from edgekv.device_profiles.work import BITS_PER_WEIGHT, weights_bytes
from edgekv.errors import UsageError
from edgekv.model_config import ModelConfig, read_json_object, read_model_config
from edgekv.spec import PageSpec


@dataclass(frozen=True)
class PlannedModel:
    """What the plan knows of a model.

    ``origin``: what ``edgekv export`` would be given; None where the plan was made for a bundle, whose checkpoint is not known.
    ``exported``: the weights are files of a bundle, not an estimate. ``here``: so are those to export. ``chats``: it has a
    chat template. ``contexts``: those between which an export must be told to choose, the smallest first; none where it need not.
    """

    source: str
    geometry: Geometry
    engine: str
    weights: str
    weights_bytes: int
    page_size: int
    exported: bool
    form: str = FORMS[0]
    origin: str | None = None
    here: bool = True
    chats: bool = False
    contexts: tuple[int, ...] = ()

    @property
    def pages(self) -> PageSpec:
        """The geometry of its pages."""
        shape = self.geometry
        return PageSpec(shape.n_kv_layers, shape.n_kv_heads, shape.head_dim, self.page_size)

    @property
    def bits_per_weight(self) -> float:
        """Bits that one weight takes, scales included."""
        return 8 * self.weights_bytes / self.geometry.parameters


def read_model(source: Path, *, engine: str | None = None, weights: str | None = None) -> PlannedModel:
    """Read the shape of a model.

    Args:
        source: a bundle, a Hugging Face checkpoint folder (its weights are not read), or a ``config.json``.
        engine: what would compute it; by default the bundle's engine, or ``onnx``.
        weights: by default the bundle's, or what `edgekv export` chooses for the size.

    Raises:
        UsageError: there is no configuration, or one that edgekv does not export (the message names the key).
        BundleError: the bundle is damaged.
    """
    if engine is not None and engine not in ENGINES:
        known = "edgekv does not run it yet" if engine in BITS_PER_WEIGHT else "unknown engine"
        raise UsageError(f"--engine {engine}: {known}; use one of {', '.join(ENGINES)}")
    if weights is not None and weights not in WEIGHTS:
        raise UsageError(f"unknown weight type {weights!r}; use one of {', '.join(WEIGHTS)}")
    if (source / MANIFEST).is_file():
        return _from_bundle(source, engine, weights)
    folder = source if source.is_dir() else source.parent
    config = _read_config(source)
    geometry = Geometry.from_model(config)
    weights = weights or default_weights(geometry.parameters)
    engine = engine or ENGINES[0]
    size = weights_bytes(geometry, BITS_PER_WEIGHT[engine][weights])
    return PlannedModel(
        str(source), geometry, engine, weights, size, PAGE_SIZE, exported=False, origin=str(folder),
        here=any(folder.glob("*.safetensors")), chats=_chats(folder),
        contexts=config.contexts,
    )  # fmt: skip


def _from_bundle(source: Path, engine: str | None, weights: str | None) -> PlannedModel:
    manifest = read_manifest(source)
    geometry = Geometry.from_model(manifest.model)
    same = weights in (None, manifest.weights) and engine in (None, manifest.engine)
    engine, weights = engine or manifest.engine, weights or manifest.weights
    # Otherwise as it would be with another engine or weights.
    size = manifest.weights_bytes() if same else weights_bytes(geometry, BITS_PER_WEIGHT[engine][weights])
    return PlannedModel(
        str(source), geometry, engine, weights, size, manifest.page_size, exported=same, form=manifest.form,
        chats=manifest.chat_template is not None,
    )  # fmt: skip


def _chats(folder: Path) -> bool:
    """Whether a checkpoint has a chat template, as far as its files are here."""
    settings = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        settings.is_file() and "chat_template" in read_json_object(settings)
    )


def _read_config(source: Path) -> ModelConfig:
    path = source / "config.json" if source.is_dir() else source
    if not path.is_file():
        raise UsageError(
            f"{source} is neither a bundle, nor a folder with a config.json, nor a config.json;"
            " download the config.json of the model"
        )
    return read_model_config(read_json_object(path), str(path))
