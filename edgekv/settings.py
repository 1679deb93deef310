"""Every value that people set: its type and its range, once for the command line, environment variables and Python.

A text is read with ``setting.read``, a value of Python is checked with ``setting.check``; both give the same value or the same
error, which names what was set and what it got::

    >>> TOP_P.read("0.9", "--top-p")
    0.9
    >>> TOP_P.check(float("nan"))
    UsageError: top_p must be a number above 0 and at most 1, not nan
"""

from __future__ import annotations

import enum
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Generic, NoReturn, SupportsFloat, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekv.contract import ENGINES, FORMS, IO, OPERATORS
from edgekv.contract import WEIGHTS as WEIGHT_KINDS
from edgekv.errors import UsageError
from edgekv.schema import shown
from edgekv.sizes import parse_bytes
from edgekv.tiers import KVMode, PressureMode

T = TypeVar("T")
E = TypeVar("E", bound=enum.Enum)

#: Longest text of a number; more digits mean nothing.
_LONGEST_NUMBER = 40
#: Longest part of a path on the file systems that matter.
_LONGEST_NAME_BYTES = 255


@dataclass(frozen=True)
class Setting(ABC, Generic[T]):
    """A value that can be set; ``name`` is its name in Python."""

    name: str

    @property
    @abstractmethod
    def wanted(self) -> str:
        """What it must be, as an error says it."""

    @property
    @abstractmethod
    def metavar(self) -> str:
        """What stands for it in a line of help."""

    @abstractmethod
    def _from_value(self, value: object) -> T | None:
        """Return the value, or None: it has another type or is out of range."""

    def _from_text(self, text: str) -> T | None:
        return self._from_value(text)

    def check(self, value: object, said: str | None = None) -> T:
        """Check a value of Python.

        Args:
            said: what the error calls it; default: the setting's name.

        Raises:
            UsageError: another type, out of range, or not finite.
        """
        try:
            found = self._from_value(value)
        except (UnicodeError, OverflowError):
            found = None
        return found if found is not None else self.refuse(value, said)

    def read(self, text: str, said: str | None = None) -> T:
        """Read a text, as of the command line or the environment.

        Raises:
            UsageError: as for :meth:`check`.
        """
        try:
            found = self._from_text(text)
        except (UnicodeError, OverflowError):
            found = None
        return found if found is not None else self.refuse(text, said)

    def optional(self, value: object, said: str | None = None) -> T | None:
        """Check a value that may be None."""
        return None if value is None else self.check(value, said)

    def environment(self, variable: str) -> T | None:
        """Read an environment variable; None when it is not set, or empty.

        Raises:
            UsageError: as for :meth:`check`.
        """
        text = os.environ.get(variable)
        return self.read(text, variable) if text else None

    def refuse(self, value: object, said: str | None = None) -> NoReturn:
        """Raise the error."""
        raise UsageError(f"{said or self.name} must be {self.wanted}, not {shown(value)}")


@dataclass(frozen=True)
class Whole(Setting[int]):
    """A whole number."""

    least: int
    most: int

    @property
    def wanted(self) -> str:  # noqa: D102
        return f"a whole number from {self.least} to {self.most}"

    @property
    def metavar(self) -> str:  # noqa: D102
        return "N"

    def _from_value(self, value: object) -> int | None:
        if not isinstance(value, Integral) or isinstance(value, bool):
            return None
        return int(value) if self.least <= int(value) <= self.most else None

    def _from_text(self, text: str) -> int | None:
        text = text.strip()
        known = len(text) <= _LONGEST_NUMBER and re.fullmatch(r"[+-]?[0-9]+", text) is not None
        return self._from_value(int(text)) if known else None


@dataclass(frozen=True)
class Real(Setting[float]):
    """A finite number; ``above`` excludes the lower end."""

    least: float
    most: float
    above: bool = False

    @property
    def wanted(self) -> str:  # noqa: D102
        if self.above:
            return f"a number above {self.least:g} and at most {self.most:g}"
        return f"a number from {self.least:g} to {self.most:g}"

    @property
    def metavar(self) -> str:  # noqa: D102
        return "X"

    def _from_value(self, value: object) -> float | None:
        if isinstance(value, (str, bytes, bool, type)) or np.ndim(value) or not isinstance(value, SupportsFloat):  # type: ignore[arg-type]
            return None
        number = float(value)
        inside = self.least < number if self.above else self.least <= number
        return number if inside and number <= self.most and math.isfinite(number) else None

    def _from_text(self, text: str) -> float | None:
        text = text.strip()
        known = len(text) <= _LONGEST_NUMBER and re.fullmatch(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", text, re.I) is not None
        try:
            return self._from_value(float(text)) if known else None
        except ValueError:
            return None


@dataclass(frozen=True)
class Flag(Setting[bool]):
    """Yes or no."""

    @property
    def wanted(self) -> str:  # noqa: D102
        return "True or False"

    @property
    def metavar(self) -> str:  # noqa: D102
        return ""

    def _from_value(self, value: object) -> bool | None:
        return bool(value) if isinstance(value, (bool, np.bool_)) else None


@dataclass(frozen=True)
class Choice(Setting[str]):
    """One of some words."""

    words: tuple[str, ...]

    @property
    def wanted(self) -> str:  # noqa: D102
        return f"one of {', '.join(self.words)}"

    @property
    def metavar(self) -> str:  # noqa: D102
        return "|".join(self.words)

    def _from_value(self, value: object) -> str | None:
        return value if isinstance(value, str) and value in self.words else None


@dataclass(frozen=True)
class Mode(Setting[E]):
    """One member of an enumeration, or its word."""

    members: type[E]

    @property
    def wanted(self) -> str:  # noqa: D102
        return f"one of {', '.join(str(member.value) for member in self.members)}"

    @property
    def metavar(self) -> str:  # noqa: D102
        return "|".join(str(member.value) for member in self.members)

    def _from_value(self, value: object) -> E | None:
        if isinstance(value, self.members):
            return value
        return next((member for member in self.members if isinstance(value, str) and member.value == value), None)


@dataclass(frozen=True)
class Size(Setting[int]):
    """Bytes: a whole number, or a text with a unit."""

    @property
    def wanted(self) -> str:  # noqa: D102
        return "a size above zero such as 64MiB, 1.5GB, 1TB or a number of bytes"

    @property
    def metavar(self) -> str:  # noqa: D102
        return "SIZE"

    def _from_value(self, value: object) -> int | None:
        if isinstance(value, str):
            try:
                return parse_bytes(value)
            except UsageError:
                return None
        return _BYTES._from_value(value)


_BYTES = Whole("bytes", 1, 2**60)


@dataclass(frozen=True)
class Budget(Setting["int | str"]):
    """Bytes as :class:`Size`, or a share as a text that ends with ``%``."""

    @property
    def wanted(self) -> str:  # noqa: D102
        return "a size such as 64MiB, 1.5GB or a number of bytes, or a share above 0% and at most 1000% such as 25%"

    @property
    def metavar(self) -> str:  # noqa: D102
        return "SIZE|SHARE"

    def _from_value(self, value: object) -> int | str | None:
        if isinstance(value, str) and value.strip().endswith("%"):
            percent = _PERCENT._from_text(value.strip()[:-1])
            return f"{percent!r}%".replace(".0%", "%") if percent is not None else None
        return _SIZE._from_value(value)

    def size_bytes(self, value: int | str, whole_bytes: int) -> int:
        """Return a budget in bytes; a share is one of ``whole_bytes``."""
        found = self.check(value)
        return found if isinstance(found, int) else int(whole_bytes * float(found[:-1]) / 100)


_SIZE = Size("size")
_PERCENT = Real("percent", 0, 1000, above=True)


@dataclass(frozen=True)
class Interval:
    """How often something is done: after so many tokens or seconds; 0 is never."""

    tokens: int
    seconds: float


@dataclass(frozen=True)
class Every(Setting[Interval]):
    """An interval, as a text."""

    @property
    def wanted(self) -> str:  # noqa: D102
        return "a number of tokens such as 64, or of seconds such as 30s"

    @property
    def metavar(self) -> str:  # noqa: D102
        return "N|SECONDS"

    def _from_value(self, value: object) -> Interval | None:
        if not isinstance(value, str):
            return None
        if value.strip().endswith("s"):
            seconds = _SECONDS._from_text(value.strip()[:-1])
            return Interval(0, seconds) if seconds is not None else None
        tokens = _TOKENS._from_text(value)
        return Interval(tokens, 0.0) if tokens is not None else None


_SECONDS = Real("seconds", 0, 86_400, above=True)
_TOKENS = Whole("tokens", 1, 2**31 - 1)


@dataclass(frozen=True)
class Words(Setting[str]):
    """A text; ``line``: without control characters, as names are."""

    line: bool = False

    @property
    def wanted(self) -> str:  # noqa: D102
        return "a text in valid UTF-8" + (" of one line" if self.line else "")

    @property
    def metavar(self) -> str:  # noqa: D102
        return "TEXT"

    def _from_value(self, value: object) -> str | None:
        if not isinstance(value, str):
            return None
        if self.line and any(ord(character) < 32 for character in value):
            return None
        value.encode("utf-8")  # half a character, or bytes of a command line that are not UTF-8
        return str(value)


@dataclass(frozen=True)
class Place(Setting[Path]):
    """The name of a file or folder; it need not exist."""

    @property
    def wanted(self) -> str:  # noqa: D102
        return f"the name of a file or folder, at most {_LONGEST_NAME_BYTES} bytes between slashes"

    @property
    def metavar(self) -> str:  # noqa: D102
        return "PATH"

    def _from_value(self, value: object) -> Path | None:
        if not isinstance(value, (str, os.PathLike)):
            return None
        name = os.fspath(value)
        if not isinstance(name, str) or not name or "\0" in name or len(os.fsencode(name)) > 4000:
            return None
        parts = os.fsencode(name).split(b"/")
        return Path(name) if max(map(len, parts)) <= _LONGEST_NAME_BYTES else None


#: The kinds of object stores, as their URLs begin.
OBJECT_STORES = ("s3", "gs", "az", "file", "memory")


@dataclass(frozen=True)
class Target(Setting["Path | str"]):
    """A folder, or the URL of an object store."""

    @property
    def wanted(self) -> str:  # noqa: D102
        return f"a folder, or the URL of an object store: {', '.join(f'{name}://' for name in OBJECT_STORES)}"

    @property
    def metavar(self) -> str:  # noqa: D102
        return "DIR|URL"

    def _from_value(self, value: object) -> Path | str | None:
        if isinstance(value, str) and "://" in value:
            return _WORDS._from_value(value) if value.partition("://")[0] in OBJECT_STORES else None
        return _PLACE._from_value(value)


_WORDS = Words("text")
_PLACE = Place("path")


@dataclass(frozen=True)
class AttendOptions:
    """Which pages a step of one token attends to; several tokens at once (prefill) attend to all.

    ``pages``: at most so many per layer. ``share``: at most this share of the pages of a layer. ``epsilon``: as many as it takes
    to prove that less than this part of every head's mass is missing. None of them, when ``selective``: as many as stay in RAM.
    """

    selective: bool = False
    pages: int | None = None
    share: float | None = None
    epsilon: float | None = None


@dataclass(frozen=True)
class Attend(Setting[str]):
    """``exact``, ``selective``, ``selective:64`` (pages), ``selective:25%`` or ``selective:0.01`` (epsilon)."""

    @property
    def wanted(self) -> str:  # noqa: D102
        return (
            "exact, selective, selective:64 (pages per layer), selective:25% (of the pages) or selective:0.01 (part of the mass"
            " that may be missing)"
        )

    @property
    def metavar(self) -> str:  # noqa: D102
        return "exact|selective[:N|:SHARE|:EPSILON]"

    def _from_value(self, value: object) -> str | None:
        return value if isinstance(value, str) and self.parsed(value) is not None else None

    def parsed(self, text: str) -> AttendOptions | None:
        """Return what a text means, or None: nothing."""
        mode, colon, limit = text.partition(":")
        if not colon:
            return AttendOptions(mode == "selective") if mode in ("exact", "selective") else None
        if mode != "selective":
            return None
        if limit.endswith("%"):
            percent = _PERCENT_OF_PAGES._from_text(limit[:-1])
            return AttendOptions(True, share=percent / 100) if percent is not None else None
        if limit.isdecimal() and limit.strip("0"):
            pages = _PAGES._from_text(limit)
            return AttendOptions(True, pages=pages) if pages is not None else None
        epsilon = _EPSILON._from_text(limit)
        return AttendOptions(epsilon > 0, epsilon=epsilon) if epsilon is not None else None


_PERCENT_OF_PAGES = Real("percent", 0, 100, above=True)
_PAGES = Whole("pages", 1, 2**31 - 1)
_EPSILON = Real("epsilon", 0, 0.999999)


def parse_attend(text: str) -> AttendOptions:
    """Return which pages a step attends to.

    Raises:
        UsageError: it is not understood.
    """
    found = ATTEND.parsed(ATTEND.check(text))
    assert found is not None
    return found


# -- what can be set -------------------------------------------------------------------------------------------------

#: More tokens than any model was made for.
MOST_TOKENS = 2**24

TEMPERATURE = Real("temperature", 0, 100)
TOP_K = Whole("top_k", 0, 2**31 - 1)
TOP_P = Real("top_p", 0, 1, above=True)
REPETITION_PENALTY = Real("repetition_penalty", 0.01, 100)
SEED = Whole("seed", 0, 2**63 - 1)

WORD = Words("word", line=True)
FILE = Place("file")
SESSION = Place("session")
BUNDLE = Place("bundle")
PROFILE = Words("profile", line=True)

PROMPT = Words("prompt")
SYSTEM = Words("system")
STOP = Words("stop")
PROMPT_TOKENS = Whole("prompt_tokens", 1, MOST_TOKENS)
#: Of a cache that is made before there is a prompt.
TOKENS_SO_FAR = Whole("prompt_tokens", 0, MOST_TOKENS)
MAX_TOKENS = Whole("max_tokens", 1, MOST_TOKENS)
PINNED = Whole("pin", 0, MOST_TOKENS)
#: Of a cache that is made before anything is generated: none may follow.
TO_FOLLOW = Whole("max_tokens", 0, MOST_TOKENS)

PAGE_SIZE = Whole("page_size", 4, 128)
CONTEXT = Whole("context", 1, MOST_TOKENS)
#: Of a plan, which recommends a command: a prompt and an answer fit into so much.
PLANNED_CONTEXT = Whole("context", 64, MOST_TOKENS)
KV_BUDGET = Budget("kv_budget")
KV = Mode("kv", KVMode)
ATTEND = Attend("attend")
ENGINE = Choice("engine", ENGINES)
FORM = Choice("form", FORMS)
WEIGHTS = Choice("weights", WEIGHT_KINDS)
OPERATORS_OF = Choice("operators", OPERATORS)
IO_OF = Choice("io", IO)
POLICY = Choice("policy", ("lru", "heavy", "window", "random"))
OFFLOAD = Target("offload")
FLASH_LIMIT = Size("flash_limit")
OFFLOAD_PATIENCE_S = Real("offload_patience_s", 1, 86_400)
ALLOW_DROP = Flag("allow_drop")
MAX_WRITE_PER_DAY = Size("max_write_per_day")
THREADS = Whole("threads", 1, 256)
PREFILL_CHUNK = Whole("prefill_chunk", 1, 65_536)
PARALLEL = Whole("parallel", 1, 64)
CACHE_LIMIT = Size("cache_limit")
REQUEST_TIMEOUT_S = Real("request_timeout_s", 1, 86_400)
GRACE_S = Real("grace_s", 0, 3_600)
BODY_LIMIT = Size("body_limit")
PRESSURE = Mode("pressure", PressureMode)
PREFIXES = Flag("prefixes")
ENCRYPT_OFFLOAD = Flag("encrypt_offload")
OWN_PROCESS = Flag("own_process")

CHECKPOINT_TOKENS = Whole("checkpoint_tokens", 0, MOST_TOKENS)
CHECKPOINT_EVERY = Every("checkpoint_every")
CHECKPOINT_SECONDS = Real("checkpoint_seconds", 0, 86_400)

MAX_MEMORY_MB = Real("max_memory_mb", 0, 2**30, above=True)
MEMORY_THRESHOLD_PERCENT = Real("memory_threshold_percent", 0, 100, above=True)
QUANTIZATION_ENABLED = Flag("quantization_enabled")
OFFLOAD_DIR = Place("offload_dir")
TOKEN_INDEX = Whole("token_index", 0, 2**31 - 1)
N_PAGES = Whole("n_pages", 1, 2**31 - 1)

APP_LIMIT = Size("app_limit")
HOURS_PER_DAY = Real("hours_per_day", 0.01, 24)
WORKERS = Whole("workers", 1, 1024)
VERIFY_TOKENS = Whole("tokens", 128, MOST_TOKENS)
OLDER_THAN_H = Real("older_than", 0, 1_000_000)

PREFIX_BYTES = Size("EDGEKV_PREFIX_BYTES")
LOG = Choice("EDGEKV_LOG", ("debug", "info", "warning", "error"))


def check_all(values: object, settings: Mapping[str, Setting[Any]], optional: Sequence[str] = ()) -> None:
    """Check fields of a frozen dataclass from its ``__post_init__``, and keep them in the type of their setting.

    Args:
        optional: fields that may be None.

    Raises:
        UsageError: the error names the field.
    """
    for name, setting in settings.items():
        value = getattr(values, name)
        if value is not None or name not in optional:
            object.__setattr__(values, name, setting.check(value, name))


def instance(value: object, kind: type[T], said: str) -> T:
    """Return a value that is of a class.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(value, kind):
        raise UsageError(f"{said} must be {kind.__name__}, not {shown(value)}")
    return value


def texts(values: object, setting: Words) -> list[str]:
    """Check a text or a sequence of texts, and return a list.

    Raises:
        UsageError: it is neither; the error names the first that is none.
    """
    if isinstance(values, str):
        return [setting.check(values)]
    if not isinstance(values, Sequence) or isinstance(values, bytes):
        setting.refuse(values)
    return [setting.check(value) for value in values]


def whole_numbers(values: object, said: str, *, most: int) -> NDArray[np.int64]:
    """Check whole numbers from 0 to ``most``, in a sequence or an array of any shape, and return them flat [n] int64.

    Raises:
        UsageError: the error names the first that is none.
    """
    if isinstance(values, (str, bytes)):
        Whole(said, 0, most).refuse(values)
    try:
        found = np.asarray(values).reshape(-1)
    except (ValueError, TypeError):  # lists of several lengths
        Whole(said, 0, most).refuse(values)
    if not found.size:
        return np.empty(0, np.int64)
    if found.dtype.kind not in "iu":
        given = values if isinstance(values, Sequence) else found.tolist()
        wrong = next((v for v in given if not isinstance(v, Integral) or isinstance(v, bool)), found[0])
        Whole(said, 0, most).refuse(wrong)
    outside = (found < 0) | (found > most)
    if outside.any():
        Whole(said, 0, most).refuse(int(found[outside][0]))
    return found.astype(np.int64)


def token_row(tokens: object, *, most: int) -> list[int]:
    """Check tokens, whole numbers from 0 to ``most`` in one row, and return them as plain integers.

    Raises:
        UsageError: the error names the first that is none.
    """
    ids: list[int] = whole_numbers(tokens, "a token", most=most).tolist()
    if np.ndim(tokens) != 1:  # type: ignore[arg-type]  # it was an array a line above
        raise UsageError(f"tokens must stand in one row, such as [1, 2, 3], not {shown(tokens)}")
    return ids
