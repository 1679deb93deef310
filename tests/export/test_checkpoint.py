"""Checkpoints as people have them: sharded, half precision, old spellings; and broken, each with one clear line."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from edgekv.bundle import SamplingSpec
from edgekv.errors import CheckpointError
from edgekv.export import export_model
from edgekv.export.checkpoint import expected_shapes, open_checkpoint
from edgekv.export.config import not_applied
from edgekv.export.executorch.split import write_embedding
from edgekv.export.weights import to_half
from tests.checkpoints import load_reference, make_checkpoint
from tests.export.driver import SplitDriver

Make = Callable[[], Path]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint to change."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "checkpoint"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def extend_tokenizer(path: Path, size: int) -> None:
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens([f"<{number}>" for number in range(tokenizer.get_vocab_size(), size)])
    tokenizer.save(str(path))


def shard(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index.update(dict.fromkeys(part, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def lose_a_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def change_index(folder: Path, changes: dict[str, str]) -> None:
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"weight_map": {**names, **changes}}))


def add_to(file: Path, name: str) -> None:
    save_file({**load_file(file), name: torch.ones(128)}, file)


def poison(folder: Path, name: str, value: float) -> None:
    change_weights(folder, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))


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
        "the configuration says [32000, 128]",
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
        lambda f: change_weights(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "tensor model.layers.1.mlp.up_proj.weight is missing",
    ),
    "wrong shape": (
        lambda f: change_config(f, intermediate_size=250),
        "has shape [256, 128], the configuration says [250, 128]",
    ),
    "integer tensor": (
        lambda f: change_weights(f, lambda t: t.update({"model.norm.weight": torch.ones(128, dtype=torch.int32)})),
        "is I32",
    ),
    "missing shard": (lose_a_shard, "model-00002-of-00002.safetensors is missing"),
    "index is no index": (lambda f: (shard(f) / INDEX).write_text("{}"), "has no weight_map"),
    "index names a file elsewhere": (
        lambda f: (shard(f) / INDEX).write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}})),
        "'../model.safetensors' is no name of a safetensors file in this folder",
    ),
    "index of another checkpoint": (
        lambda f: change_index(shard(f), {"model.layers.9.extra.weight": "model-00001-of-00002.safetensors"}),
        "model-00001-of-00002.safetensors holds tensor model.layers.9.extra.weight, and it does not",
    ),
    "one tensor in two shards": (
        lambda f: add_to(shard(f) / "model-00001-of-00002.safetensors", "model.norm.weight"),
        "model-00001-of-00002.safetensors and model-00002-of-00002.safetensors both hold tensor model.norm.weight",
    ),
    "a whole file beside shards and their index": (
        lambda f: shutil.copy(shard(f) / "model-00001-of-00002.safetensors", f / "model.safetensors"),
        "holds two checkpoints: model-00001-of-00002.safetensors does not belong to model.safetensors",
    ),
    "a shard of an older export": (
        lambda f: save_file({"a": torch.ones(1)}, shard(f) / "model-00003-of-00003.safetensors"),
        "holds two checkpoints: model-00003-of-00003.safetensors does not belong to model.safetensors.index.json",
    ),
    "shards without an index beside a whole file": (
        lambda f: save_file({"a": torch.ones(1)}, f / "model-00001-of-00003.safetensors"),
        "holds two checkpoints: model-00001-of-00003.safetensors does not belong to model.safetensors",
    ),
    "weights of another name": (
        lambda f: (f / "model.safetensors").rename(f / "my_model.safetensors"),
        "neither model.safetensors nor model.safetensors.index.json; is my_model.safetensors to be renamed",
    ),
    "an adapter beside the base": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "holds an adapter (adapter_config.json)",
    ),
    "an adapter alone": (
        lambda f: (f / "model.safetensors").rename(f / "adapter_model.safetensors"),
        "holds an adapter (adapter_model.safetensors)",
    ),
    "weights that config.json names": (
        lambda f: change_config(f, transformers_weights="a.safetensors"),
        "transformers_w",
    ),
    "a tensor that nothing uses": (
        lambda f: change_weights(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(128)})),
        "tensor model.layers.0.self_attn.q_proj.bias would be left out",
    ),
    "tensors of a layer that config.json does not have": (
        lambda f: change_config(f, num_hidden_layers=2),
        "tensor model.layers.2.input_layernorm.weight and 8 more would be left out",
    ),
    "a token without a row": (
        lambda f: extend_tokenizer(f / "tokenizer.json", 385),
        "the number 384, and the embedding has 384 rows; save the model again after resize_token_embeddings",
    ),
    "NaN in a weight": (
        lambda f: poison(f, "model.layers.1.mlp.up_proj.weight", math.nan),
        "up_proj.weight holds 1 values",
    ),
    "infinity in a norm": (lambda f: poison(f, "model.norm.weight", math.inf), "model.norm.weight holds 1 values"),
    "infinity in the embedding": (
        lambda f: poison(f, "model.embed_tokens.weight", -math.inf),
        "embed_tokens.weight holds",
    ),
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


def test_end_tokens_that_the_vocabulary_lacks_are_none(copy: Path) -> None:
    change_config(copy, eos_token_id=[-1, 257, 384])
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1, 300, 9999]}))
    assert open_checkpoint(copy).config.model.eos_token_ids == (257, 300)


def test_end_tokens_come_from_both_configs(copy: Path) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [300, 257]}))
    assert open_checkpoint(copy).config.model.eos_token_ids == (257, 300)


def test_sampling_is_that_of_transformers_for_the_same_generation_config(copy: Path) -> None:
    from transformers import GenerationConfig

    path = copy / "generation_config.json"
    defaults = GenerationConfig()._get_default_generation_params()
    for said in (
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05},
        {"do_sample": True, "temperature": 1, "top_k": 0, "top_p": None},
    ):
        path.write_text(json.dumps(said))
        expected = {**defaults, **{name: value for name, value in said.items() if value is not None}}
        found = open_checkpoint(copy).sampling
        assert found is not None
        assert all(value == expected[name] for name, value in dataclasses.asdict(found).items()), said


def test_what_does_not_sample_is_greedy_and_keeps_its_repetition_penalty(copy: Path) -> None:
    path = copy / "generation_config.json"
    for said in ({"temperature": 0.6}, {"do_sample": False, "top_p": 0.9}, {"do_sample": None}):
        path.write_text(json.dumps(said))
        assert open_checkpoint(copy).sampling is None
    path.write_text(json.dumps({"repetition_penalty": 1.1, "temperature": 0.7}))
    assert open_checkpoint(copy).sampling == SamplingSpec(repetition_penalty=1.1)
    path.unlink()
    assert open_checkpoint(copy).sampling is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 1.5),
        ("top_k", 2.5),
        ("repetition_penalty", 0),
        ("do_sample", 1),
    ],
)
def test_a_senseless_sampling_is_refused_by_name(copy: Path, name: str, value: object) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"do_sample": True, name: value}))
    with pytest.raises(CheckpointError, match=rf"generation_config.json: {name} is .*; it must be"):
        open_checkpoint(copy)


def test_what_a_generation_config_asks_for_in_vain_is_told(copy: Path) -> None:
    path = copy / "generation_config.json"
    assert not_applied(copy) == {}
    path.write_text(
        json.dumps({"min_p": 0.1, "typical_p": 1.0, "num_beams": 4, "suppress_tokens": [], "max_length": 20})
    )
    assert not_applied(copy) == {"num_beams": 4}, "greedy answers do not know min_p"
    path.write_text(json.dumps({"do_sample": True, "min_p": 0.1, "suppress_tokens": [3], "no_repeat_ngram_size": 0}))
    assert not_applied(copy) == {"min_p": 0.1, "suppress_tokens": [3]}


def rename_all(folder: Path, name: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name(old): tensor for old, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def leave_a_stale_index(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    lose_a_shard(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(whole)


ODD: dict[str, tuple[dict[str, Any], Callable[[Path], object]]] = {
    "tied, and another head is there": (
        {"tie_word_embeddings": True},
        lambda f: change_weights(f, lambda t: t.update({"lm_head.weight": torch.randn(384, 128)})),
    ),
    "tied, and the same head is there": (
        {"tie_word_embeddings": True},
        lambda f: change_weights(f, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})),
    ),
    "tied, stored as the head": (
        {"tie_word_embeddings": True},
        lambda f: rename_all(f, lambda name: name.replace("model.embed_tokens", "lm_head")),
    ),
    "saved without its head": (
        {"tie_word_embeddings": True},
        lambda f: rename_all(f, lambda name: name.removeprefix("model.")),
    ),
    "rotary caches of old versions": (
        {},
        lambda f: change_weights(
            f, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
        ),
    ),
    "a stale index beside a whole file": ({}, leave_a_stale_index),
    "another file beside the whole one": ({}, lambda f: save_file({"a": torch.ones(1)}, f / "zz_old.safetensors")),
    "the files of Mistral beside the shards": (
        {},
        lambda f: save_file({"tok_embeddings.weight": torch.ones(1)}, shard(f) / "consolidated.safetensors"),
    ),
    "shards": ({}, shard),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_checkpoint_holds_the_weights_that_transformers_loads(case: str, tmp_path: Path) -> None:
    changes, make_odd = ODD[case]
    folder = make_checkpoint(tmp_path / "odd", **changes)
    make_odd(folder)
    for file in folder.glob("model*.safetensors"):  # transformers insists on the format
        save_file(load_file(file), file, {"format": "pt"})
    theirs = load_reference(folder).state_dict()
    ours = open_checkpoint(folder)
    names = expected_shapes(ours.config)
    if "lm_head.weight" not in names:
        assert torch.equal(theirs["lm_head.weight"], theirs["model.embed_tokens.weight"])
        del theirs["lm_head.weight"]
    assert set(names) == set(theirs)
    assert all(torch.equal(ours.tensor(name), tensor) for name, tensor in theirs.items())


def test_a_fused_tensor_that_is_missing_or_of_another_height_is_named(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, name = tmp_path / "fused", "model.layers.1.mlp.gate_up_proj.weight"
    shutil.copytree(checkpoint("phi3"), folder)
    change_weights(folder, lambda t: t.update({name: t[name][1:].clone()}))
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[511, 128\], the configuration says \[512, 128\]"):
        open_checkpoint(folder)
    change_weights(folder, lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        open_checkpoint(folder)


def test_a_tied_flag_beside_another_head_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "odd", tie_word_embeddings=True)
    change_weights(folder, lambda t: t.update({"lm_head.weight": torch.randn(384, 128)}))
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    tokens = list(range(40))
    with torch.no_grad():
        expected = load_reference(folder)(torch.tensor([tokens])).logits[0].numpy()
    export_model(folder, tmp_path / "out.edgekv", engine="onnx", weights="fp32")
    assert abs(SplitDriver(tmp_path / "out.edgekv").step(tokens) - expected).max() <= 1e-3


@pytest.mark.parametrize(
    ("form", "weights", "name", "width"),
    [
        ("split", "fp16", "model.layers.1.mlp.down_proj.weight", 128),
        ("inline", "fp16", "model.layers.2.self_attn.k_proj.weight", 128),
        ("split", "fp16", "lm_head.weight", 128),
        ("split", "int8", "model.embed_tokens.weight", 48),  # its rows do not fill blocks of 32
    ],
)
def test_a_weight_beyond_fp16_is_refused_by_name_where_it_becomes_fp16(
    form: str, weights: str, name: str, width: int, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "large", hidden_size=width)
    poison(folder, name, -70000.0)
    with pytest.raises(CheckpointError, match=f"tensor {name} holds 70000, and fp16 ends at 65504"):
        export_model(folder, tmp_path / "out.edgekv", engine="onnx", form=form, weights=weights)
    assert not (tmp_path / "out.edgekv").exists()


@pytest.mark.parametrize(("factor", "lost"), [(1e-5, ""), (1e-7, "17%"), (1e-9, "100%"), (1e-30, "100%")])
def test_a_weight_that_fp16_cannot_tell_from_others_is_refused_by_name(factor: float, lost: str) -> None:
    exact = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32) * np.float32(factor)
    if not lost:
        np.testing.assert_allclose(to_half(exact, "w"), exact, atol=3e-8)
        return
    with pytest.raises(CheckpointError, match=f"tensor w holds numbers too small for fp16.* {lost}; export"):
        to_half(exact, "w")


def test_zeros_are_zeros_in_fp16() -> None:
    assert not to_half(np.zeros((3, 4), np.float32), "w").any()


def test_the_embedding_of_executorch_beyond_fp16_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "large", hidden_size=48)
    poison(folder, "model.embed_tokens.weight", 65504.0)
    write_embedding(open_checkpoint(folder), tmp_path, "int8")
    poison(folder, "model.embed_tokens.weight", 65505.0)
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight holds 65505, and fp16 ends at 65504"):
        write_embedding(open_checkpoint(folder), tmp_path, "int8")
