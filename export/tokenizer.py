"""What a checkpoint's tokenizer files say together, as transformers reads them: one tokenizer.json and the named tokens.

A checkpoint folder spreads its tokenizer over several files (tokenizer.json, tokenizer_config.json, special_tokens_map.json,
added_tokens.json, chat templates). A bundle holds one tokenizer.json that says it all, so a device reads no other.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekv.bundle import TOKENIZER
from edgekv.errors import CheckpointError
from edgekv.model_config import read_json_object
from edgekv.schema import shown

from .tokenizer_class import as_class, class_of

#: The names under which a tokenizer's configuration holds special tokens. Source: transformers, SPECIAL_TOKENS_ATTRIBUTES.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
#: What a tokenizer class calls its tokens when its configuration leaves them out. Source: transformers, these classes.
_DEFAULTS = {
    "LlamaTokenizer": _SENTENCEPIECE,
    "CodeLlamaTokenizer": _SENTENCEPIECE,
    "GPT2Tokenizer": {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk")},
    "Qwen2Tokenizer": {f"{name}_token": "<|endoftext|>" for name in ("eos", "unk", "pad")},
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
#: A token that text is matched against before the tokenizer's model sees it: its flags, with ``id`` and ``content``.
Added = dict[str, Any]


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of a checkpoint.

    ``json``: the content of the tokenizer.json that a bundle gets. ``special_tokens``: by name, as chat templates use
    them. ``bos_token_id``, ``eos_token_id``: of the tokens of those names, None without.
    """

    json: str
    special_tokens: Mapping[str, str]
    chat_template: str | None
    bos_token_id: int | None
    eos_token_id: int | None

    def spell(self, ids: Iterable[int]) -> tuple[str, ...]:
        """Return the texts of tokens; that of one that only the embedding has is empty."""
        return tuple(self._tokenizer.id_to_token(number) or "" for number in ids)

    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens that stand before and behind those of a prompt."""
        encoding = self._tokenizer.encode("a")
        added = list(zip(encoding.ids, encoding.special_tokens_mask, strict=True))
        begin = tuple(number for number, _ in itertools.takewhile(lambda token: token[1], added))
        behind = itertools.takewhile(lambda token: token[1], reversed(added[len(begin) :]))
        return begin, tuple(number for number, _ in behind)[::-1]

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.json)


def read_tokenizer(folder: Path, vocab_size: int) -> TokenizerFiles:
    """Read the tokenizer files of a checkpoint folder.

    Tokens that only tokenizer_config.json (or added_tokens.json) knows are added, truncation, padding and
    dropout are turned off.

    Args:
        vocab_size: rows of the embedding; a named token (often a pad token) that would get none is not added.

    Raises:
        CheckpointError: tokenizer.json is missing or damaged, two files give a token different ids, a token has no row, or
            tokenizer_config.json has a value that means nothing or cannot be kept.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {TOKENIZER}; save the fast tokenizer there: AutoTokenizer.save_pretrained({folder.name!r})"
        )
    text, data = _read(path), read_json_object(path)
    tokenizer = _load(path, text)
    settings_path = folder / "tokenizer_config.json"
    settings = _optional(settings_path)
    if settings.get("split_special_tokens"):  # a switch of transformers that a tokenizer.json has no place for
        raise CheckpointError(
            f"{settings_path}: split_special_tokens is on, and a bundle always reads special tokens as such; set it to false"
        )
    added = {entry["content"]: entry for entry in _entries(path, data.get("added_tokens") or [])}
    before = sorted(added.values(), key=_number)
    declared = settings.get("added_tokens_decoder")
    if declared is not None:
        entries = _entries(settings_path, _by_id(settings_path, declared))
    else:  # as older versions of transformers wrote them
        settings |= _optional(folder / "special_tokens_map.json")
        _refuse_no_tokens(settings_path, settings)
        entries = _legacy(folder / "added_tokens.json", settings)
        entries = [e for e in entries if e["content"] not in added or e["id"] != added[e["content"]]["id"]]
    for entry in entries:
        known = added.setdefault(entry["content"], entry)
        if known["id"] != entry["id"]:
            raise _disagree(folder, entry, known["id"])
        # A token that is special once stays so; what else is said of it, the configuration says last.
        added[entry["content"]] = {**entry, "special": known["special"] or entry["special"]}
    _refuse_no_tokens(settings_path, settings)
    model = _optional(folder / "config.json")
    named_class = settings.get("tokenizer_class") or model.get("tokenizer_class")
    cls = class_of(data, str(named_class or ""), str(model.get("model_type")))
    named, further = _special(settings, tokenizer, cls)
    free = max((tokenizer.get_vocab_size(), *(entry["id"] + 1 for entry in added.values())))
    for token in (*named.values(), *further):
        if token["content"] in added:
            added[token["content"]]["special"] = True
            continue
        number = tokenizer.token_to_id(token["content"])
        if number is None and free < vocab_size:
            number, free = free, free + 1
        if number is not None:
            added[token["content"]] = {**token, "id": number}
    tokens = sorted(added.values(), key=_number)
    made = as_class(data, settings, cls)
    if made["model"].get("dropout"):  # for training: one text would be cut into other tokens each time
        made = {**made, "model": {**made["model"], "dropout": None}}
    if made is not data or tokens != before or data.get("truncation") or data.get("padding"):
        text = json.dumps({**made, "added_tokens": tokens, "truncation": None, "padding": None}, ensure_ascii=False)
        tokenizer = _load(path, text)
    for entry in tokens:
        if (number := tokenizer.token_to_id(entry["content"])) != entry["id"]:
            raise _disagree(folder, entry, number)
    _refuse_tokens_without_a_row(folder, tokenizer, vocab_size)
    names = {name: token["content"] for name, token in named.items()}
    bos, eos = (tokenizer.token_to_id(names[name]) if name in names else None for name in ("bos_token", "eos_token"))
    return TokenizerFiles(text, names, _chat_template(folder, settings), bos, eos)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download the checkpoint again") from error


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _load(path: Path, text: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path} is not a tokenizer ({error}); download the checkpoint again") from error


def _special(settings: Mapping[str, Any], tokenizer: Any, cls: str) -> tuple[dict[str, Added], list[Added]]:
    """Return the special tokens that have names, in transformers' order, and further ones; none has an ``id`` yet."""
    defaults = {n: t for n, t in _DEFAULTS.get(cls, {}).items() if tokenizer.token_to_id(t) is not None}
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    own = {name: value for name, value in settings.items() if name.endswith("_token") and name not in NAMED}
    values = {**{name: settings.get(name, defaults.get(name)) for name in NAMED}, **own}
    if isinstance(extra, dict):
        values, extra = {**values, **extra}, []
    named = {name: token for name, value in values.items() if (token := _token(value)) is not None}
    return named, [token for value in extra if (token := _token(value)) is not None]


def _refuse_no_tokens(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse special tokens that are none, where the names say that they are."""
    for name in ("extra_special_tokens", "additional_special_tokens"):
        listed = settings.get(name) or []
        if not isinstance(listed, list | dict):
            raise _no_tokens(path, name, listed, "a list of tokens or an object of them by name")
        for value in listed.values() if isinstance(listed, dict) else listed:
            if value and _token(value) is None:
                raise _no_tokens(path, name, value, "texts, or objects with a content, as tokens")
    for name in NAMED:
        if settings.get(name) and _token(settings[name]) is None:
            raise _no_tokens(path, name, settings[name], "a text, or an object with a content")


def _no_tokens(path: Path, name: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name} must have {wanted}, not {shown(value)}; download the checkpoint again")


def _token(value: Any) -> Added | None:
    """Read a special token as configurations write it, a string or an object; None where there is none."""
    flags = value if isinstance(value, dict) else {}
    content = flags.get("content") if isinstance(value, dict) else value
    return _added(content, {**flags, "special": True}) if isinstance(content, str) and content else None


def _added(content: str, flags: Mapping[str, Any]) -> Added:
    flags = {"normalized": not flags.get("special", False), **flags}
    return {"content": content, **{name: bool(flags.get(name, False)) for name in _FLAGS}}


def _number(entry: Added) -> int:
    return int(entry["id"])


def _by_id(path: Path, declared: Any) -> list[Any]:
    if not isinstance(declared, dict) or not all(str(key).isdecimal() and len(str(key)) < 12 for key in declared):
        raise CheckpointError(f"{path}: added_tokens_decoder does not give tokens by id; download the checkpoint again")
    tokens = sorted(((int(key), value) for key, value in declared.items()), key=lambda pair: pair[0])
    return [{**value, "id": key} if isinstance(value, dict) else value for key, value in tokens]


def _legacy(path: Path, settings: Mapping[str, Any]) -> list[Added]:
    """Return the tokens of added_tokens.json: special are those that a name or a list of special tokens has."""
    further = (settings.get(name) or [] for name in ("extra_special_tokens", "additional_special_tokens"))
    values = [*(settings.get(name) for name in NAMED), *itertools.chain(*further)]
    special = {token["content"] for value in values if (token := _token(value)) is not None}
    listed = [{"content": text, "id": key, "special": text in special} for text, key in _optional(path).items()]
    return _entries(path, listed)


def _entries(path: Path, entries: list[Any]) -> list[Added]:
    for entry in entries:
        if not (isinstance(entry, dict) and isinstance(entry.get("content"), str) and isinstance(entry.get("id"), int)):
            raise CheckpointError(f"{path}: {entry!r} does not describe an added token; download the checkpoint again")
    return [{"id": entry["id"], **_added(entry["content"], entry)} for entry in entries]


def _refuse_tokens_without_a_row(folder: Path, tokenizer: Any, vocab_size: int) -> None:
    numbers = {number: text for text, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    always = tokenizer.encode("")  # what a template puts around a text
    numbers |= dict(zip(always.ids, always.tokens, strict=True))
    beyond = min((number for number in numbers if not 0 <= number < vocab_size), default=None)
    if beyond is not None:
        raise CheckpointError(
            f"{folder}: the tokenizer gives {numbers[beyond]!r} the number {beyond}, and the embedding has {vocab_size} rows;"
            " save the model again after resize_token_embeddings(len(tokenizer)), or remove the token"
        )


def _disagree(folder: Path, entry: Added, other: int | None) -> CheckpointError:
    return CheckpointError(
        f"{folder}: the tokenizer files disagree: token {entry['content']!r} is number {entry['id']} in one and {other} in"
        f" another; save the tokenizer again: AutoTokenizer.save_pretrained"
    )


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the template of ordinary conversations: a file of its own goes before tokenizer_config.json."""
    alone, others = folder / "chat_template.jinja", folder / "additional_chat_templates"
    if alone.is_file():
        return _read(alone)
    if (others / "default.jinja").is_file():
        return _read(others / "default.jinja")
    template = settings.get("chat_template")
    if isinstance(template, list) and all(map(_is_named_template, template)):  # the one called "default"
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a text, or a list of objects with a name and a template,"
            f" not {shown(template)}; download the checkpoint again"
        )
    return template


def _is_named_template(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))
