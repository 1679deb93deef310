"""GGUF files as sources: the same decoder as the checkpoint that they were made from, or one line that says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from typer.testing import CliRunner

from edgekv.cli.main import app
from edgekv.errors import CheckpointError
from edgekv.export import export_model
from edgekv.export.checkpoint import open_checkpoint
from edgekv.export.gguf.checkpoint import open_gguf
from edgekv.export.gguf.file import read_gguf
from edgekv.export.gguf.tokenizer import read_gguf_tokenizer
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.tiers import KVMode
from tests.checkpoints import TEXT, load_reference, make_checkpoint, make_tokenizer

from .gguf_files import convert, metadata, tensors, vocabulary, write_gguf

Kind = GGMLQuantizationType
FAMILIES = {name: name for name in ("llama", "qwen2", "qwen3", "smollm3", "seed_oss", "olmo2")}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
Change = Callable[[dict[str, Any], dict[str, Any]], object]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_in_floats_is_the_checkpoint_that_it_was_made_from(tmp_path: Path, family: str) -> None:
    folder = make_checkpoint(tmp_path / "hf", family, num_hidden_layers=4, tie_word_embeddings=family == "qwen3")
    theirs = open_checkpoint(folder)
    ours = open_gguf(convert(folder, tmp_path / "m.gguf", FAMILIES[family], Kind.F32))
    assert ours.config == theirs.config
    assert ours.location.keys() == theirs.location.keys()
    for name in theirs.location:
        assert torch.equal(ours.tensor(name), theirs.tensor(name)), name
    text = TEXT + "<|user|>12345 it's<|end|>"
    assert (
        Tokenizer.from_str(ours.tokenizer.json).encode(text).ids
        == Tokenizer.from_str(theirs.tokenizer.json).encode(text).ids
    )


def test_factors_of_the_rotary_frequencies_are_the_llama3_scaling(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", "llama", rope_parameters=LLAMA3_ROPE)
    scaled = np.array(open_checkpoint(folder).config.model.rope.inv_freq)
    plain = 10000.0 ** (-np.arange(0, 32, 2) / 32)
    weights = tensors(folder, "llama") | {"rope_freqs.weight": (plain / scaled).astype(np.float32)}
    keys = metadata(folder, "llama") | vocabulary(make_tokenizer(384), "gpt-2", bos=256, eos=257)
    ours = open_gguf(write_gguf(tmp_path / "m.gguf", keys, weights, Kind.F32))
    np.testing.assert_allclose(ours.config.model.rope.inv_freq, scaled, rtol=1e-6)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q5_1, Kind.Q5_0, Kind.Q4_1, Kind.Q4_0])
def test_a_quantised_file_gives_the_text_of_transformers_with_the_same_weights(
    tmp_path: Path, kind: Kind, checkpoint: Path
) -> None:
    path = convert(checkpoint, tmp_path / "m.gguf", "llama", kind)
    export_model(path, tmp_path / "m.edgekv", engine="onnx", weights="fp32")
    reference = load_reference(checkpoint)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim > 1:
                codes = quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(quants.dequantize(codes, kind)))
    with Generator.open(tmp_path / "m.edgekv", RunOptions(kv=KVMode.FP16)) as generator, torch.no_grad():
        tokens = generator.text.encode("An operating system runs")
        said = list(generator.tokens(tokens, max_tokens=24))
        answer = reference.generate(torch.tensor([tokens]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert said == [token for token in answer[0, len(tokens) :].tolist() if token != 257]


def test_every_type_of_codes_means_what_the_format_says(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    written = {}
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    for kind in Kind:
        block, size = GGML_QUANT_SIZES[kind]
        raw = chance.integers(0, 60, (3, 512 // block * size), np.uint8)  # of any byte, as fp16 scales might be NaN
        try:
            values = quants.dequantize(raw, kind)
        except (NotImplementedError, ValueError):
            continue
        written[kind.name] = values
        writer.add_tensor(kind.name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"} <= written.keys()
    opened = read_gguf(tmp_path / "m.gguf")
    for name, values in written.items():
        np.testing.assert_array_equal(opened.tensors[name].read().numpy(), values)


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
SAID = [
    TEXT,
    "It's 2026-11-29, 1234567 things;  two  spaces\n\n\ttabs\r\nI'LL DON'T we've",
    "e\N{COMBINING ACUTE ACCENT}t\N{COMBINING ACUTE ACCENT}",
    "नमस्ते مرحبا 你好\N{IDEOGRAPHIC FULL STOP} <|user|>hi<|end|>",
    "",
    " ",
    "x" * 300,
]


@pytest.mark.parametrize(
    ("pre", "steps", "normalizer", "ignore_merges"),
    [
        ("gpt-2", [], None, False),
        ("smollm", [pre_tokenizers.Digits(individual_digits=True)], None, False),
        ("llama-bpe", [pre_tokenizers.Split(Regex(LLAMA3), "isolated")], None, True),
        ("qwen2", [pre_tokenizers.Split(Regex(QWEN2), "isolated")], normalizers.NFC(), False),
    ],
)
def test_a_byte_level_vocabulary_cuts_text_as_its_name_says(
    tmp_path: Path, checkpoint: Path, pre: str, steps: list[Any], normalizer: Any, ignore_merges: bool
) -> None:
    theirs = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    theirs.pre_tokenizer = pre_tokenizers.Sequence([*steps, plain])
    theirs.decoder = decoders.ByteLevel()
    if normalizer is not None:
        theirs.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=370, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    theirs.train_from_iterator(SAID * 3, trainer)
    theirs.add_special_tokens(["<|begin|>", "<|user|>", "<|end|>"])
    keys = metadata(checkpoint, "llama") | vocabulary(theirs, pre, bos=370)
    file = read_gguf(write_gguf(tmp_path / "m.gguf", keys, {}, Kind.F32))
    ours = Tokenizer.from_str(read_gguf_tokenizer(file, 384).json)
    begin = [370] if pre == "llama-bpe" else []
    for text in SAID:
        assert ours.encode(text).ids == begin + theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text).ids)


def test_a_sentencepiece_vocabulary_merges_the_better_pieces_first(tmp_path: Path, checkpoint: Path) -> None:
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    words = ["▁", "t", "h", "e", "▁t", "he", "▁the", "n", "▁then", "en", "re", "r", "there", "▁there"]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *words]
    theirs = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁the", "n"), ("e", "n"), ("r", "e"), ("▁the", "re")],
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    keys = metadata(checkpoint, "llama") | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259
        + [-float(number) for number in (90, 91, 92, 93, 1, 2, 3, 94, 4, 5, 6, 95, 99, 7)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    file = read_gguf(write_gguf(tmp_path / "m.gguf", keys, {}, Kind.F32))
    ours = Tokenizer.from_str(read_gguf_tokenizer(file, 384).json)
    for text in ("the then there", "there  é then", "then\n", "3 the"):
        assert ours.encode(text).ids == [1, *theirs.encode(text).ids], text
        assert ours.decode(ours.encode(text).ids) == text


def keys_without(name: str) -> Change:
    return lambda keys, weights: keys.pop(name)


def with_key(name: str, value: object) -> Change:
    return lambda keys, weights: keys.update({name: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_key("general.architecture", "mamba"), "unknown architecture 'mamba'"),
        (keys_without("llama.block_count"), "no llama.block_count"),
        (with_key("llama.block_count", "three"), "llama.block_count is 'three'"),
        (with_key("llama.expert_count", 8), "llama.expert_count = 8"),
        (with_key("llama.rope.dimension_count", 16), "rope.dimension_count = 16 and heads of 32"),
        (with_key("split.count", 3), "one of 3 parts"),
        (with_key("tokenizer.ggml.pre", "tekken"), "pre-tokenizer 'tekken' is not known"),
        (with_key("tokenizer.ggml.model", "t5"), "a tokenizer of the kind 't5'"),
        (with_key("tokenizer.ggml.eos_token_id", 9999), "eos_token_id is 9999"),
        (with_key("tokenizer.ggml.merges", ["a b c"]), "'a b c' is no merge"),
        (with_key("tokenizer.ggml.tokens", ["a"] * 384), "384 tokens (1 distinct)"),
        (lambda keys, weights: weights.pop("blk.1.ffn_up.weight"), "model.layers.1.mlp.up_proj.weight is missing"),
        (lambda keys, weights: weights.pop("token_embd.weight"), "token_embd.weight is missing"),
        (
            lambda keys, weights: weights.update({"blk.0.attn_sinks.weight": np.ones(4, np.float32)}),
            "attn_sinks.weight would be left out",
        ),
        (lambda keys, weights: weights.update({"rope_freqs.weight": np.zeros(16, np.float32)}), "positive factors"),
    ],
)
def test_what_is_not_understood_is_one_line_that_names_it(
    tmp_path: Path, checkpoint: Path, change: Change, said: str
) -> None:
    keys = metadata(checkpoint, "llama") | vocabulary(make_tokenizer(384), "gpt-2", bos=256, eos=257)
    weights = tensors(checkpoint, "llama")
    change(keys, weights)
    path = write_gguf(tmp_path / "m.gguf", keys, weights, Kind.F32)
    with pytest.raises(CheckpointError) as error:
        open_gguf(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    whole = convert(checkpoint, tmp_path / "m.gguf", "llama", Kind.Q8_0).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 64, 3), *range(64, len(whole), len(whole) // 60), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="is cut off or not a GGUF file"):
            open_gguf(cut)


def test_a_type_that_is_not_known_is_named(tmp_path: Path, checkpoint: Path) -> None:
    data = bytearray(convert(checkpoint, tmp_path / "m.gguf", "llama", Kind.Q8_0).read_bytes())
    name = b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions, and two of them
    path = tmp_path / "new.gguf"
    for kind, said in (
        (99, r"new.gguf holds a tensor of type 99, which the installed package gguf does not know"),
        (Kind.Q8_1, r"tensor blk.0.ffn_up.weight is Q8_1, which cannot be turned into floats"),
    ):
        data[at : at + 4] = int(kind).to_bytes(4, "little")
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=said):
            export_model(path, tmp_path / "b", engine="onnx")


def test_the_command_exports_a_file(tmp_path: Path, checkpoint: Path) -> None:
    path = convert(
        checkpoint, tmp_path / "m.gguf", "llama", Kind.Q8_0, **{"tokenizer.chat_template": "{{ messages[0].content }}"}
    )
    done = CliRunner().invoke(
        app, ["export", str(path), "--out", str(tmp_path / "m.edgekv"), "--json", "--engine", "onnx"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["model"]["architecture"] == "llama"
    assert (tmp_path / "m.edgekv" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
