"""The border of every file format: bytes become one typed value, or one error that says what is wrong, and where.

A format is a dataclass that stands beside the code that uses it; types and ranges (:class:`msgspec.Meta`) are on its
fields, what several fields must have in common is in its ``__post_init__``. Nothing behind the border checks again.

A key that the format does not have is refused: it may matter, and whoever wrote it thought so. Numbers are finite.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import re
import stat
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

import msgspec
from msgspec import Meta

from edgekv.errors import FormatError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

#: No file that is read whole is larger: the largest is the manifest of a model with some thousand files.
LARGEST_BYTES = 16 << 20

#: Numbers that several formats have in common. None may be so large that what is computed from it leaves 64 bits.
Positive = Annotated[int, Meta(ge=1, le=1 << 31)]
Natural = Annotated[int, Meta(ge=0, le=1 << 31)]
Bytes = Annotated[int, Meta(ge=0, le=1 << 62)]
Finite = Annotated[float, Meta(ge=-1e30, le=1e30)]
PositiveFinite = Annotated[float, Meta(gt=0, le=1e30)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
#: Seconds since 1970, up to the last year that a date can have.
Moment = Annotated[float, Meta(ge=0, le=253_000_000_000)]
Share = Annotated[float, Meta(ge=0, le=1)]

#: What msgspec calls a type, and people do.
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
    "null": "nothing",
}
_WORD = re.compile(rf"\b({'|'.join(_WORDS)})\b")


def read_whole(path: Path, limit_bytes: int = LARGEST_BYTES) -> bytes:
    """Read a small file.

    Raises:
        FormatError: it is larger than ``limit_bytes``. OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        data = stream.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise FormatError(f"it is larger than {limit_bytes >> 20} MiB")
    return data


def from_json(data: bytes, kind: type[T]) -> T:
    """Read JSON as a value of the dataclass ``kind``.

    Raises:
        FormatError: it is no JSON, or not such a value; the message names the place in it.
    """
    return checked(plain_json(data), kind)


def plain_json(data: bytes) -> Any:
    """Read JSON as plain data.

    Raises:
        FormatError: it is none.
    """
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"it is not valid JSON: {_first_line(error)}") from error


def plain_toml(data: bytes) -> dict[str, Any]:
    """Read TOML as plain data.

    Raises:
        FormatError: it is none.
    """
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise FormatError("it is not valid TOML: it is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits is a bare ValueError
        raise FormatError(f"it is not valid TOML: {_first_line(error)}") from error


def checked(data: object, kind: type[T], where: str = "") -> T:
    """Return plain data, as JSON and TOML give it, as a value of the dataclass ``kind``.

    Args:
        where: what the place of a fault begins with, such as ``turn 1``.

    Raises:
        FormatError: it is no such value; the message names the place in it.
    """
    _refuse_unknown(data, kind, where)
    try:
        return msgspec.convert(data, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        problem, _, place = _first_line(error).partition(" - at `$")
        place = place.rstrip("`")
        at = _dotted(where, place)
        missing = re.fullmatch(r"Object missing required field `(.*)`", problem)
        if missing:
            raise FormatError(f"{_dotted(where, f'{place}.{missing[1]}')} is missing") from error
        expected = re.fullmatch(r"Expected (.*?)(, got .*)?", problem)
        if expected:
            wanted = _WORD.sub(lambda word: _WORDS[word[0]], expected[1].replace("`", "").replace(" | ", " or "))
            raise FormatError(f"{at} {_value_at(data, place)}; it must be {wanted}".lstrip()) from error
        raise FormatError(f"{at}: {problem}".lstrip(": ")) from error


def shown(value: object) -> str:
    """Return a value as an error names it: in one line that is not long."""
    text = printable(" ".join(repr(value.value if isinstance(value, enum.Enum) else value).split()))
    return text if len(text) <= 60 else f"{text[:57]}..."


def printable(text: str) -> str:
    """Return a text in which nothing breaks the line or the terminal: a key of a file may be anything."""
    return text if text.isprintable() else ascii(text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``did you mean "..."?`` for a near miss; otherwise the known words, if they are few."""
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if near:
        return f'did you mean "{near[0]}"?'
    return f"use one of {', '.join(words)}." if len(words) <= 12 else ""


def one_of(value: object, where: str, choices: Iterable[str]) -> None:
    """Refuse a word that is none of the choices.

    Raises:
        FormatError: the message names them.
    """
    words = tuple(choices)
    if value not in words:
        raise FormatError(f"{where} is {shown(value)}; it must be one of {', '.join(words)}")


def plain_name(name: str, where: str) -> str:
    """Return the name of a file that lies directly in a folder.

    Args:
        where: what the name was found as, for the message.

    Raises:
        FormatError: it leads elsewhere, or could.
    """
    outside = name in ("", ".", "..") or any(mark in name for mark in "/\\:")
    if outside or not name.isprintable() or len(name.encode()) > 255:
        raise FormatError(f"{where} is {shown(name)}, not the plain name of a file in the folder")
    return name


def file_within(folder: Path, name: str) -> Path:
    """Return the file of a name from :func:`plain_name`, by way of links that stay in the folder.

    Raises:
        FormatError: it leads out of the folder, or is no regular file. OSError: it is not there, or cannot be looked at.
    """
    path = folder / name
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise FormatError(f"{name} is no file")
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        raise FormatError(f"{name} is a link that leads out of the folder; put the file itself there (cp -L)")
    return path


def _refuse_unknown(data: object, kind: Any, where: str) -> None:
    """Refuse a key that the format does not have, however deep."""
    kind = _bare(kind)
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for option in map(_bare, options):
        if isinstance(data, dict):
            if dataclasses.is_dataclass(option) or is_typeddict(option):
                fields = _fields(option)
                for key, value in data.items():
                    at = _dotted(where, f".{key}")
                    if key not in fields:
                        raise FormatError(f"{at} is not a field; {did_you_mean(key, fields)}".rstrip(" ;"))
                    _refuse_unknown(value, fields[key], at)
            elif get_origin(option) is dict:
                for key, value in data.items():
                    _refuse_unknown(value, get_args(option)[1], _dotted(where, f".{key}"))
        elif isinstance(data, list) and get_origin(option) in (tuple, list):
            for index, value in enumerate(data):
                _refuse_unknown(value, get_args(option)[0], _dotted(where, f"[{index}]"))


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _dotted(where: str, place: str) -> str:
    """Join what leads to a value; entries of lists are counted from 1, as people do."""
    steps = re.sub(r"\[(\d+)\]", lambda index: f" {int(index[1]) + 1}", place)
    return printable(f"{where}{steps}".lstrip("."))


def _value_at(data: Any, place: str) -> str:
    """Say what stands at a place such as ``.model.windows[1]``."""
    try:
        for key, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", place.replace("[...]", ".?")):
            data = data[key] if key else data[int(index)]
    except (KeyError, TypeError, IndexError):
        return "is something else"
    return f"is {shown(data)}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
