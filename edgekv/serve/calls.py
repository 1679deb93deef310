"""Calls of tools: how a template has its model write them, how they are read out of an answer, and how one is forced.

A template tells its way itself: a conversation with a call in it is rendered and looked at.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgekv.errors import UsageError
from edgekv.runtime.text import Text

#: Mistral's templates want ids of so many letters and digits.
_ID_LETTERS = 9


@dataclass(frozen=True)
class Way:
    """How calls are written.

    Attributes:
        begin: stands before a call; "": an answer that begins as a JSON object is one.
        end: stands behind it; "": it goes on to the end of the answer.
        before, behind: what is between them and the object, or the list of objects.
        arguments: the key of the arguments, beside ``name``.
    """

    begin: str
    end: str
    before: str
    behind: str
    arguments: str


#: Nous Hermes, Qwen 2.5 and 3, SmolLM3 and many others.
HERMES = Way("<tool_call>", "</tool_call>", "\n", "\n", "arguments")
#: Mistral, until its tokenizer of 2025.
MISTRAL = Way("[TOOL_CALLS]", "", " [", "]", "arguments")
#: Llama 3.1 to 3.3.
LLAMA = Way("", "", "", "", "parameters")

_TOOL = {
    "type": "function",
    "function": {"name": "edgekv_probe", "description": "", "parameters": {"type": "object", "properties": {}}},
}
_USER = {"role": "user", "content": "a"}


def new_id() -> str:
    """Return the id of a call."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(_ID_LETTERS))


def way_of(text: Text) -> Way | None:
    """Return how the chat template of a bundle has calls written; None: it knows no tools, or a way that is not known here."""
    called = {
        "role": "assistant",
        "tool_calls": [
            {"id": new_id(), "type": "function", "function": {"name": "edgekv_probe", "arguments": {"a": 1}}}
        ],
    }
    try:
        plain, known = text.encode_chat([_USER]), text.encode_chat([_USER], [_TOOL])
    except UsageError:
        return None
    if plain == known:
        return None
    try:
        shown = _named(text, text.encode_chat([_USER, called], [_TOOL]))
    except UsageError:  # SmolLM3 tells its model of calls, and writes none
        shown = _named(text, known)
    for way in (HERMES, MISTRAL):
        if way.begin in shown:
            return way
    return LLAMA if '{"name": "edgekv_probe", "parameters": ' in shown else None


def _named(text: Text, tokens: Sequence[int]) -> str:
    """Return the text of tokens with the names of the special ones."""
    parts: list[str] = []
    plain: list[int] = []
    for token in tokens:
        if token in text.special:
            parts += [text.decode(plain), text.special[token]]
            plain = []
        else:
            plain.append(token)
    return "".join([*parts, text.decode(plain)])


# -- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Called:
    """A call that was read; ``arguments`` is JSON."""

    name: str
    arguments: str


class CallReader:
    """Reads calls out of an answer as it comes; everything else stays text, calls that are none too.

    Args:
        names: of the functions; where nothing marks a call, other objects are text.
        most: calls that are given; further ones are left out.
    """

    def __init__(self, way: Way, names: Collection[str], most: int) -> None:
        self._way = way
        self._names = names
        self._most = most
        self._held = ""
        self._inside = False
        self._begun = False  # there was text
        self.count = 0

    def feed(self, text: str) -> Iterator[str | Called]:
        """Take the next part of the answer; gives what is certain now."""
        self._held += text
        while True:
            found = self._call() if self._inside else self._text()
            if found is None:
                return
            yield from found

    def finish(self) -> Iterator[str | Called]:
        """Give the rest, at the end of the answer."""
        if self._inside:
            yield from self._read(self._held, f"{self._way.begin}{self._held}")
        elif self._held.strip() or not self.count:
            yield self._held
        self._held = ""

    def _text(self) -> list[str | Called] | None:
        """Give text up to where a call begins, or could; None: no more for now."""
        way, held = self._way, self._held
        if way.begin:
            at = held.find(way.begin)
            self._inside = at >= 0
            certain = at if self._inside else len(held) - _overlap(held, way.begin)
            rest = certain + len(way.begin) if self._inside else certain
            said = held[:certain].rstrip()  # between calls there are lines that say nothing
            rest = rest if self._inside else len(said)
        else:
            self._inside = not self._begun and held.lstrip()[:1] == "{"
            said = "" if self._inside or not (self._begun or held.strip()) else held
            rest = len(said)
        self._held = held[rest:]
        self._begun |= bool(said)
        return [said] if said else [] if self._inside else None

    def _call(self) -> list[str | Called] | None:
        way = self._way
        at = self._held.find(way.end) if way.end else -1
        if at < 0:
            return None
        written, self._held = self._held[:at], self._held[at + len(way.end) :]
        self._inside = False
        return self._read(written, f"{way.begin}{written}{way.end}")

    def _read(self, written: str, whole: str) -> list[str | Called]:
        calls = _calls(written)
        if calls is None or (not self._way.begin and any(call.name not in self._names for call in calls)):
            return [whole]
        given = calls[: self._most - self.count]
        self.count += len(given)
        return list(given)


def _overlap(text: str, mark: str) -> int:
    """Return with how many characters of a mark a text ends."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def _calls(text: str) -> list[Called] | None:
    """Return the calls of a text: JSON objects, alone, one after the other or in a list; None: it is something else."""
    decoder, at = json.JSONDecoder(), 0
    values: list[Any] = []
    try:
        while at < len(text):
            if text[at].isspace() or (values and text[at] in ";,"):
                at += 1
                continue
            value, at = decoder.raw_decode(text, at)
            values += value if isinstance(value, list) else [value]
    except (ValueError, RecursionError):
        return None
    calls = []
    for value in values:
        name = value.get("name") if isinstance(value, dict) else None
        arguments = value.get("arguments", value.get("parameters")) if isinstance(name, str) else None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        calls.append(Called(name, json.dumps(arguments, ensure_ascii=False)))
    return calls or None


# -- forcing ---------------------------------------------------------------------------------------------------------

#: JSON as templates write it, so that calls look as those that the model has learned.
_AS_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def forced(way: Way, functions: Sequence[Mapping[str, Any]], special: Mapping[str, int], *, several: bool) -> str:
    """Return the grammar, in llguidance's Lark, of an answer that is a call of one of some functions, or several calls.

    Args:
        functions: with ``name`` and ``parameters``.
        special: the numbers of special tokens by their names.
    """
    call = " | ".join(f"call{index}" for index in range(len(functions)))
    begin, end = _mark(way.begin, special), _mark(way.end, special)
    lines = []
    if way is HERMES:
        one = f"{begin} {_said(way.before)} ({call}) {_said(way.behind)} {end}"
        lines.append("start: one" + (f" ({_said(chr(10))} one)*" if several else ""))
        lines.append(f"one: {one}")
    elif way is MISTRAL:
        more = f' (", " ({call}))*' if several else ""
        lines.append(f"start: {begin} {_said(way.before)} ({call}){more} {_said(way.behind)}")
    else:
        lines.append(f"start: {call}")
    for index, function in enumerate(functions):
        lines.append(f'call{index}: {_said(_opened(way, function))} arguments{index} "}}"')
        lines.append(f"arguments{index}: %json {json.dumps(_parameters(function))}")
    return "\n".join(lines)


def strictly(way: Way, functions: Sequence[Mapping[str, Any]], special: Mapping[str, int]) -> str:
    """Return the grammar of an answer that may be any text, but in whose calls the arguments keep to their schemas.

    Raises:
        UsageError: nothing marks calls, or a special token does.
    """
    from llguidance import StructTag

    if not way.begin or way.begin in special:
        raise UsageError(
            "strict functions need the tool_choice required, or a named one: with auto, the calls of this model's template"
            " cannot be told from text in advance"
        )
    tags = [
        StructTag(
            trigger=way.begin,
            begin=f"{way.begin}{way.before}{_opened(way, function)}",
            grammar=_parameters(function),
            end="}" + way.behind + way.end,
        )
        for function in functions
    ]
    return StructTag.to_grammar(tags, assume_special=False)


def _opened(way: Way, function: Mapping[str, Any]) -> str:
    return f'{{"name": {json.dumps(function["name"])}, {json.dumps(way.arguments)}: '


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    return {**(function.get("parameters") or {"type": "object", "properties": {}}), "x-guidance": _AS_WRITTEN}


def _mark(mark: str, special: Mapping[str, int]) -> str:
    return f"<[{special[mark]}]>" if mark in special else _said(mark)


def _said(text: str) -> str:
    return json.dumps(text) if text else ""
