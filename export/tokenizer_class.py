"""What a tokenizer class of transformers makes of a tokenizer.json, as tokenizer_config.json asks for it.

transformers 5 reads most classes from the file as it is. Those below decide about the space before a text; LlamaTokenizer
writes it before the text alone, where files of before wrote one behind every special token too. How a byte-level tokenizer
splits text stays as the file says: a model was trained with that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]

#: Models whose tokenizers transformers reads with one class, whatever their configuration names; None: from the file as it is.
#: Source: transformers, TOKENIZER_MAPPING_NAMES and MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.
_OF_MODEL: Mapping[str, str | None] = {"mistral": None, "qwen2": "Qwen2Tokenizer"}


#: Those of models whose configuration names none. Source: as above.
_UNNAMED = {"qwen3": "Qwen2Tokenizer"}


def class_of(data: Json, named: str, model_type: str) -> str:
    """Return the class with which transformers reads a tokenizer.json; "" is from the file as it is.

    Args:
        data: the content. named: the class that tokenizer_config.json names, or else config.json; "" is none.
        model_type: of config.json.
    """
    named = (named or _UNNAMED.get(model_type, "")).removesuffix("Fast")
    cls = _OF_MODEL.get(model_type, named)
    return "" if cls is None or (cls == "LlamaTokenizer" and not _is_sentencepiece(data)) else cls


def as_class(data: Json, settings: Mapping[str, Any], cls: str) -> Json:
    """Return the content of a tokenizer.json as a class reads it; the same object where that changes nothing.

    Args:
        data: the content. settings: of tokenizer_config.json. cls: of :func:`class_of`.
    """
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return data
    space = settings.get("add_prefix_space")
    if cls == "LlamaTokenizer":
        made = _llama(data, space=space is None or bool(space), legacy=bool(settings.get("legacy")))
    elif cls == "CodeLlamaTokenizer" and _is_sentencepiece(data):
        made = _code_llama(data, settings, space=space is None or bool(space))
    elif cls in ("GPT2Tokenizer", "Qwen2Tokenizer") and space is not None:
        made = {**data, "pre_tokenizer": _with_space(data.get("pre_tokenizer"), space=bool(space))}
    else:
        return data
    return data if made == data else made


def _llama(data: Json, *, space: bool, legacy: bool) -> Json:
    scheme = ("always" if legacy else "first") if space else "never"
    return _sentencepiece(data, scheme, strip=space, unknown=None)


def _code_llama(data: Json, settings: Mapping[str, Any], *, space: bool) -> Json:
    def content(name: str, default: str) -> str:
        token = settings.get(name, default)
        return str(token["content"] if isinstance(token, dict) else token)

    made = _sentencepiece(data, "first" if space else "never", strip=True, unknown=content("unk_token", "<unk>"))
    bos = content("bos_token", "<s>")
    added = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
    number = added.get(bos, data["model"]["vocab"].get(bos))
    if number is None:
        return made
    parts = [
        ({"SpecialToken": {"id": bos, "type_id": at}}, {"Sequence": {"id": "AB"[at], "type_id": at}}) for at in (0, 1)
    ]
    begin = {
        "type": "TemplateProcessing",
        "single": list(parts[0]),
        "pair": [*parts[0], *parts[1]],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }
    return {**made, "post_processor": begin}


def _sentencepiece(data: Json, scheme: str, *, strip: bool, unknown: str | None) -> Json:
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        **data,
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {**data["model"], "unk_token": unknown, "fuse_unk": True, "byte_fallback": True},
    }


def _is_sentencepiece(data: Json) -> bool:
    """Say whether a tokenizer only writes ``▁`` for a space, and perhaps one before the text."""
    before = data.get("pre_tokenizer") or {"type": "Metaspace"}
    changes = data.get("normalizer") or {"type": "Sequence", "normalizers": []}
    changes = changes["normalizers"] if changes["type"] == "Sequence" else [changes]
    return before["type"] == "Metaspace" and all(change["type"] in ("Prepend", "Replace") for change in changes)


def _with_space(part: Any, *, space: bool) -> Any:
    """Return a pre-tokenizer whose byte level puts a space before a text, or none."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "ByteLevel":
        return {**part, "add_prefix_space": space}
    if part.get("type") == "Sequence":
        return {**part, "pretokenizers": [_with_space(one, space=space) for one in part["pretokenizers"]]}
    return part
