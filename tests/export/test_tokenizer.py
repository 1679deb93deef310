"""Tokenizer files as people have them: together they give transformers' tokens, in one file; what disagrees is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from edgekv.bundle import read_manifest
from edgekv.errors import CheckpointError
from edgekv.export import export_model
from edgekv.export.checkpoint import open_checkpoint
from edgekv.export.tokenizer import TokenizerFiles, read_tokenizer
from edgekv.runtime.text import Text
from tests.checkpoints import CHAT_TEMPLATE
from tests.tokenizer_kinds import KINDS, SPECIAL, make_tokenizer, token_id

ROOM = 4096  #: rows of an embedding that no token is beyond
SAYING = "<s><|im_start|>user\nHi there, it isn't over. 東京 <|im_end|>\n<think> hm </think><|tool|>x</s>[PAD]"
Settings = dict[str, Any]


def flags(content: str, *, special: bool = True, **more: bool) -> Settings:
    names = ("lstrip", "normalized", "rstrip", "single_word")
    return {"content": content, "special": special, **dict.fromkeys(names, False), **more}


def write(folder: Path, name: str, data: Settings) -> None:
    (folder / name).write_text(json.dumps(data), encoding="utf-8")


def change(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    write(folder, name, {**(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}), **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tokenizer files without a checkpoint: byte-level, no special tokens."""
    KINDS["byte_level"]().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return tmp_path


def opened(folder: Path, vocab_size: int = ROOM) -> tuple[TokenizerFiles, Text]:
    files = read_tokenizer(folder, vocab_size)
    made = folder / "made"
    made.mkdir(exist_ok=True)
    (made / "tokenizer.json").write_text(files.json, encoding="utf-8")
    return files, Text(made / "tokenizer.json", None, files.special_tokens)


def compare(folder: Path) -> TokenizerFiles:
    """Check that text and back is as in transformers; returns what was read."""
    files, text = opened(folder)
    reference = AutoTokenizer.from_pretrained(folder)
    ids = reference(SAYING).input_ids
    assert text.encode(SAYING) == ids
    plain = reference(SAYING, add_special_tokens=False).input_ids
    begin, end = files.frame()
    assert [*begin, *plain, *end] == ids
    assert text.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert dict(files.special_tokens) == reference.special_tokens_map
    assert (files.bos_token_id, files.eos_token_id) == (reference.bos_token_id, reference.eos_token_id)
    return files


def with_decoder(folder: Path) -> int:
    """Let tokenizer_config.json alone know the special tokens; returns the first of their ids."""
    first = token_id(make_tokenizer("byte_level"), SPECIAL[0])
    tokens = {str(first + at): flags(content) for at, content in enumerate(SPECIAL)}
    tokens[str(first + 4)] = flags("<think>", special=False, normalized=False)
    tokens[str(first + 5)] = flags("</think>", special=False, lstrip=True, rstrip=True)
    change(folder, "tokenizer_config.json", added_tokens_decoder=tokens, bos_token="<s>", eos_token="<|im_end|>")
    return first


def test_special_tokens_that_only_the_config_knows_are_tokens(folder: Path) -> None:
    first = with_decoder(folder)
    files = compare(folder)
    assert files.eos_token_id == first + 3
    _, text = opened(folder)
    assert text.encode("<|im_start|>") == [first + 2]
    assert text.special == {first + at: content for at, content in enumerate(SPECIAL)}


def test_flags_of_the_config_go_before_those_of_the_tokenizer(folder: Path) -> None:
    make_tokenizer("byte_level").save(str(folder / "tokenizer.json"))
    with_decoder(folder)
    tokens = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    first = min(map(int, tokens))
    tokens[str(first + 2)] = flags("<|im_start|>", special=False, rstrip=True)
    change(folder, "tokenizer_config.json", added_tokens_decoder=tokens)
    compare(folder)


def test_files_of_older_versions_are_read(folder: Path) -> None:
    first = token_id(make_tokenizer("byte_level"), SPECIAL[0])
    write(folder, "added_tokens.json", {content: first + at for at, content in enumerate([*SPECIAL, "<think>"])})
    special = {"bos_token": flags("<s>"), "eos_token": "</s>", "extra_special_tokens": ["<|im_start|>"]}
    write(folder, "special_tokens_map.json", special)
    files = compare(folder)
    assert files.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_named_tokens_that_no_file_numbers_are_added(folder: Path) -> None:
    change(folder, "tokenizer_config.json", bos_token="<s>", pad_token={"__type": "AddedToken", **flags("[PAD]")})
    compare(folder)


def test_names_of_a_models_own_tokens_reach_templates(folder: Path) -> None:
    with_decoder(folder)
    change(folder, "tokenizer_config.json", image_token="<|im_start|>", extra_special_tokens={"tool_token": "<|tool|>"})
    files = compare(folder)
    assert files.special_tokens["image_token"] == "<|im_start|>"
    assert files.special_tokens["tool_token"] == "<|tool|>"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_gives_the_tokens_of_transformers(kind: str, tmp_path: Path) -> None:
    make_tokenizer(kind, ends=True).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write(tmp_path, "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": False})
    compare(tmp_path)


def test_a_pad_token_beyond_the_embedding_has_a_name_and_no_number(folder: Path) -> None:
    size = KINDS["byte_level"]().get_vocab_size()
    change(folder, "tokenizer_config.json", pad_token="[PAD]")
    files, text = opened(folder, vocab_size=size)
    assert files.special_tokens == {"pad_token": "[PAD]"}
    assert max(text.encode("a [PAD]")) < size
    _, text = opened(folder, vocab_size=size + 1)
    assert text.encode("[PAD]") == [size]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["byte_level", "llama_2"])
@pytest.mark.parametrize("by_model", [False, True])
@pytest.mark.parametrize("cls", ["LlamaTokenizerFast", "GPT2Tokenizer", "PreTrainedTokenizerFast", None])
def test_the_default_names_of_a_class_are_used_where_the_tokenizer_has_them(
    cls: str | None, by_model: bool, kind: str, model_type: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(kind)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    named = {"tokenizer_class": cls} if cls else {}
    write(tmp_path, "tokenizer_config.json", {} if by_model else named)
    write(tmp_path, "config.json", {"model_type": model_type, **(named if by_model else {})})
    reference = AutoTokenizer.from_pretrained(tmp_path)
    names = {name: getattr(reference, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    assert opened(tmp_path)[0].special_tokens == {
        name: token for name, token in names.items() if token is not None and tokenizer.token_to_id(token) is not None
    }


def test_truncation_and_padding_are_turned_off(folder: Path) -> None:
    plain = read_tokenizer(folder, ROOM).json
    assert plain == (folder / "tokenizer.json").read_text(encoding="utf-8"), "a good file is copied as it is"
    tokenizer = KINDS["byte_level"]()
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=128)
    tokenizer.save(str(folder / "tokenizer.json"))
    files, text = opened(folder)
    assert json.loads(files.json)["truncation"] is json.loads(files.json)["padding"] is None
    saying = "An operating system runs programs larger than memory. " * 3
    assert text.encode(saying) == KINDS["byte_level"]().encode(saying).ids


def test_dropout_is_turned_off(folder: Path) -> None:
    path = folder / "tokenizer.json"
    plain = opened(folder)[1]
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["dropout"] = 0.9
    path.write_text(json.dumps(data), encoding="utf-8")
    _, text = opened(folder)
    saying = "An operating system runs programs larger than memory. " * 3
    assert {tuple(text.encode(saying)) for _ in range(5)} == {tuple(plain.encode(saying))}


def two_numbers(folder: Path) -> None:
    make_tokenizer("byte_level").save(str(folder / "tokenizer.json"))
    change(folder, "tokenizer_config.json", added_tokens_decoder={"7": flags("<|im_end|>")})


DISAGREE: dict[str, tuple[Callable[[Path], object], str]] = {
    "two numbers": (two_numbers, "disagree: token '<|im_end|>' is number"),
    "a number that another token has": (
        lambda f: change(f, "tokenizer_config.json", added_tokens_decoder={"7": flags("<|new|>")}),
        "disagree: token '<|new|>' is number 7 in one",
    ),
    "a gap": (
        lambda f: change(f, "tokenizer_config.json", added_tokens_decoder={"3000": flags("<|new|>")}),
        "disagree: token '<|new|>' is number 3000 in one",
    ),
    "an older file": (lambda f: write(f, "added_tokens.json", {"<|new|>": 7}), "disagree: token '<|new|>'"),
    "no number": (
        lambda f: change(f, "tokenizer_config.json", added_tokens_decoder={"x": flags("<|new|>")}),
        "added_tokens_decoder does not give tokens by id",
    ),
    "no token": (
        lambda f: change(f, "tokenizer_config.json", added_tokens_decoder={"400": 5}),
        "5 does not describe an added token",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "not a tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "is not a tokenizer"),
    "not an object": (lambda f: (f / "tokenizer.json").write_text("[]"), "does not hold a JSON object"),
    "bad text": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe"), "cannot be read"),
}


@pytest.mark.parametrize("case", DISAGREE)
def test_files_that_disagree_or_are_damaged_are_refused_in_one_line(case: str, folder: Path) -> None:
    break_it, message = DISAGREE[case]
    break_it(folder)
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(folder, ROOM)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_chat_template_is_found_in_each_of_its_places(folder: Path) -> None:
    def template() -> str | None:
        return read_tokenizer(folder, ROOM).chat_template

    assert template() is None
    change(folder, "tokenizer_config.json", chat_template=CHAT_TEMPLATE)
    assert template() == CHAT_TEMPLATE
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    change(folder, "tokenizer_config.json", chat_template=named)
    assert template() == "b"
    (folder / "chat_template.jinja").write_text("c")
    assert template() == "c"


def test_a_text_ends_at_every_end_token_that_a_file_names(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint("llama"), tmp_path / "checkpoint"))
    write(source, "generation_config.json", {"eos_token_id": [300, 257]})
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    end = {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}["<|end|>"]
    change(source, "tokenizer_config.json", eos_token="<|end|>", bos_token="<|begin|>")
    assert open_checkpoint(source).config.model.eos_token_ids == (257, 300, end)
    manifest = export_model(source, tmp_path / "out.edgekv", engine="onnx")
    assert manifest.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    assert manifest.eos_tokens[2] == "<|end|>"
    assert len(manifest.eos_tokens) == 3
    assert read_manifest(tmp_path / "out.edgekv") == manifest


def test_a_bundle_of_before_names_its_tokens_by_the_models_numbers(
    checkpoint: Callable[[str], Path], bundle: Callable[..., Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle("demo"), tmp_path / "old.edgekv"))
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["special_tokens"]
    path.write_text(json.dumps(manifest))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}] * 2
    old, new = (Text.open(folder, read_manifest(folder)) for folder in (copy, bundle("demo")))
    assert old.encode_chat(messages) == new.encode_chat(messages)


CLASSES: dict[str, tuple[str, Settings]] = {
    f"{cls} of {kind} with {more}": (kind, {"tokenizer_class": cls, **more})
    for kind, classes in {
        "byte_level": ("GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"),
        "llama_2": ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "PreTrainedTokenizerFast"),
    }.items()
    for cls in classes
    for more in ({}, {"add_prefix_space": True}, {"add_prefix_space": False}, {"legacy": True}, {"legacy": False})
    if cls.startswith("Llama") or "legacy" not in more
}


@pytest.mark.parametrize(
    ("case", "model_type"),
    [
        (case, model_type)
        for case in CLASSES
        for model_type in ("llama", "mistral", "qwen3", *(["qwen2"] if case.startswith("Qwen2") else []))
    ],
)
def test_a_tokenizer_class_and_its_prefix_space_give_the_tokens_of_transformers(
    case: str, model_type: str, tmp_path: Path
) -> None:
    kind, settings = CLASSES[case]
    tokenizer = make_tokenizer(kind)
    if settings["tokenizer_class"] == "Qwen2Tokenizer":  # this class splits in a way of its own
        split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        tokenizer.normalizer = normalizers.NFC()
    if settings["tokenizer_class"] == "CodeLlamaTokenizer":  # which begins every text, and ends none
        end = ("</s>", tokenizer.token_to_id("</s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", **settings})
    write(tmp_path, "config.json", {"model_type": model_type})
    reference, (_, text) = AutoTokenizer.from_pretrained(tmp_path), opened(tmp_path)
    for saying in ("Hello world", " Hello  world", "<s>Hi</s> there\n<|im_start|>it isn't", "\t東京", SAYING, ""):
        ids = reference.encode(saying)
        assert text.encode(saying) == ids, saying
        assert text.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split_special_tokens": True}, "split_special_tokens is on"),
        ({"chat_template": ["a"]}, "chat_template must be a text, or a list of objects .* not ['a']"),
        ({"chat_template": [{"name": "default", "template": 5}]}, "chat_template must be a text"),
        ({"chat_template": 5}, "chat_template must be a text, .* not 5"),
        ({"chat_template": {"default": "a"}}, "chat_template must be a text"),
        ({"extra_special_tokens": 5}, "extra_special_tokens must have a list of tokens or an object"),
        ({"extra_special_tokens": "<a>"}, "extra_special_tokens must have a list of tokens or an object"),
        ({"extra_special_tokens": [5]}, "extra_special_tokens must have texts"),
        ({"extra_special_tokens": {"tool_token": ["a"]}}, "extra_special_tokens must have texts"),
        ({"additional_special_tokens": True}, "additional_special_tokens must have a list"),
        ({"bos_token": 5}, "bos_token must have a text, or an object with a content, not 5"),
        ({"eos_token": {"text": "a"}}, "eos_token must have a text"),
        ({"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "added_tokens_decoder does not give tokens by id"),
    ],
)
def test_a_value_of_the_configuration_that_means_nothing_is_refused_with_its_file_and_key(
    folder: Path, changes: Settings, message: str
) -> None:
    change(folder, "tokenizer_config.json", **changes)
    with pytest.raises(CheckpointError, match=message.replace("[", r"\[").replace("]", r"\]")) as caught:
        read_tokenizer(folder, ROOM)
    assert str(folder / "tokenizer_config.json") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
