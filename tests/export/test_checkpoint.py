"""Checkpoints as people have them: sharded, half precision, old spellings; and broken, each with one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgekv.errors import CheckpointError
from edgekv.export import export_model
from edgekv.export.checkpoint import open_checkpoint

Make = Callable[[], Path]


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint to change."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "checkpoint"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors")
        index.update(dict.fromkeys(part, f"model-{number}.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def lose_a_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-1.safetensors").unlink()


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "unknown architecture": (lambda f: change_config(f, model_type="mamba"), "unknown architecture 'mamba'"),
    "no architecture": (lambda f: change_config(f, model_type=...), "unknown architecture None"),
    "a number is missing, which means another one": (
        lambda f: change_config(f, vocab_size=...),
        "config.json says [32000, 128]",
    ),
    "unknown activation": (lambda f: change_config(f, hidden_act="gelu"), "hidden_act is 'gelu'"),
    "unknown rope": (
        lambda f: change_config(f, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}),
        "rope type 'longrope'",
    ),
    "rope setting missing": (
        lambda f: change_config(f, rope_parameters={"rope_type": "llama3", "factor": 8.0}),
        "needs 'low_freq_factor'",
    ),
    "already quantised": (lambda f: change_config(f, quantization_config={"bits": 4}), "already quantised"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no *.safetensors"),
    "truncated weights": (truncate, "is truncated or not a safetensors file"),
    "missing tensor": (
        lambda f: change_weights(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),  # type: ignore[arg-type,return-value]
        "tensor model.layers.1.mlp.up_proj.weight is missing",
    ),
    "wrong shape": (
        lambda f: change_config(f, intermediate_size=250),
        "has shape [256, 128], config.json says [250, 128]",
    ),
    "integer tensor": (
        lambda f: change_weights(f, lambda t: t.update({"model.norm.weight": torch.ones(128, dtype=torch.int32)})),
        "is I32",
    ),
    "missing shard": (lose_a_shard, "model-1.safetensors is missing"),
    "mixed layer types": (lambda f: change_config(f, layer_types=["linear_attention"] * 3), "layer_types"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line_and_leaves_nothing(case: str, copy: Path, tmp_path: Path) -> None:
    break_it, message = BROKEN[case]
    break_it(copy)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as caught:
        export_model(copy, tmp_path / "out.edgekv")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_sharded_checkpoint_is_the_same_checkpoint(copy: Path) -> None:
    whole = open_checkpoint(copy).sha256()
    shard(copy)
    assert open_checkpoint(copy).sha256() == whole


def test_bfloat16_is_read_as_float32(copy: Path) -> None:
    change_weights(copy, lambda t: t.update({name: value.to(torch.bfloat16) for name, value in t.items()}))
    tensor = open_checkpoint(copy).tensor("model.norm.weight")
    assert tensor.dtype == torch.float32


def test_the_rope_of_older_configs_is_the_same(copy: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    change_config(copy, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    new = open_checkpoint(copy).config.model.rope
    change_config(copy, rope_parameters=..., rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    assert open_checkpoint(copy).config.model.rope == new


def test_end_tokens_come_from_both_configs(copy: Path) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [300, 257]}))
    assert open_checkpoint(copy).config.model.eos_token_ids == (257, 300)
