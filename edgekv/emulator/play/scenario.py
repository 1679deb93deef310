"""A scenario: what an app is asked to do on a device, and what happens meanwhile. One TOML file."""

from __future__ import annotations

import sys
import types
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from edgekv.errors import UsageError
from edgekv.tiers import KVMode

from ..events import Event

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = TypeVar("Table")


@dataclass(frozen=True)
class AppSettings:
    """How the app runs its model: as the options of ``edgekv run``, and how it behaves.

    ``context``: None is what all turns need together. ``session``: it keeps its conversation in a session, so that it goes on
    where it was after a kill. ``restart_s``: from a kill to its next start; ``restarts``: per turn at the most.
    """

    kv_budget: int | str | None = None
    kv: str = "auto"
    context: int | None = None
    policy: str = "lru"
    attend: str = "exact"
    allow_drop: bool = False
    session: bool = False
    checkpoint_tokens: int = 64
    prefill_chunk: int = 256
    restart_s: float = 2.0
    restarts: int = 3

    def __post_init__(self) -> None:
        if self.kv not in [mode.value for mode in KVMode]:
            raise UsageError(f"kv is {self.kv!r}; choose auto, fp16 or int8")


@dataclass(frozen=True)
class Turn:
    """One request to the app and its answer. Turns are a conversation: each prompt is added to what was said before.

    ``prompt``: text; ``prompt_file``: its file, beside the scenario; ``prompt_tokens``: so many tokens, drawn by the seed.
    ``pause_s``: before it. ``repeat``: how often.
    """

    prompt: str | None = None
    prompt_file: str | None = None
    prompt_tokens: int | None = None
    max_tokens: int = 64
    pause_s: float = 0.0
    repeat: int = 1

    def __post_init__(self) -> None:
        given = [name for name in ("prompt", "prompt_file", "prompt_tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError("a turn needs one of prompt, prompt_file and prompt_tokens")
        if (self.prompt_tokens is not None and self.prompt_tokens < 1) or self.max_tokens < 1 or self.repeat < 1:
            raise UsageError("prompt_tokens, max_tokens and repeat of a turn are 1 or more")
        if self.pause_s < 0:
            raise UsageError("pause_s of a turn is negative")


@dataclass(frozen=True)
class Scenario:
    """Turns of a conversation, and events by virtual time."""

    turns: tuple[Turn, ...]
    title: str = "one prompt"
    app: AppSettings = AppSettings()
    events: tuple[Event, ...] = ()


def load_scenario(path: Path) -> Scenario:
    """Read a scenario.

    Raises:
        UsageError: the file cannot be read, or says something unknown or impossible; the message names the place.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the scenario {path}: {error}") from error
    unknown = set(data) - {"title", "app", "turn", "event"}
    if unknown:
        raise UsageError(
            f"{path}: unknown key {sorted(unknown)[0]!r}; a scenario has title, [app], [[turn]] and [[event]]"
        )
    turns = [_table(Turn, table, f"{path}: turn {index}") for index, table in enumerate(_list(data, "turn", path), 1)]
    if not turns:
        raise UsageError(f"{path} has no [[turn]]: nothing is asked of the app")
    return Scenario(
        turns=tuple(_with_file(turn, path) for turn in turns for _ in range(turn.repeat)),
        title=str(data.get("title", path.stem)),
        app=_table(AppSettings, data.get("app", {}), f"{path}: app"),
        events=tuple(
            _table(Event, table, f"{path}: event {index}") for index, table in enumerate(_list(data, "event", path), 1)
        ),
    )


def _list(data: dict[str, Any], name: str, path: Path) -> list[dict[str, Any]]:
    tables = data.get(name, [])
    if not isinstance(tables, list):
        raise UsageError(f"{path}: write [[{name}]], with two brackets: there may be several")
    return tables


def _table(kind: type[Table], data: dict[str, Any], where: str) -> Table:
    """Make a dataclass of a TOML table, each value of the type that its field says."""
    hints = get_type_hints(kind)
    known = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    for name, value in data.items():
        if name not in known:
            raise UsageError(f"{where}: unknown key {name!r}; it has {', '.join(known)}")
        allowed = get_args(hints[name]) if get_origin(hints[name]) in (Union, types.UnionType) else (hints[name],)
        if not (isinstance(value, allowed) or (float in allowed and isinstance(value, int))) or (
            isinstance(value, bool) and bool not in allowed
        ):
            words = " or ".join(option.__name__ for option in allowed if option is not type(None))
            raise UsageError(f"{where}: {name} is {value!r}; it must be {words}")
    for name, entry in known.items():
        if entry.default is MISSING and name not in data:
            raise UsageError(f"{where}: {name} is missing")
    try:
        return kind(**data)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _with_file(turn: Turn, scenario: Path) -> Turn:
    if turn.prompt_file is None:
        return turn
    path = scenario.parent / turn.prompt_file
    try:
        return Turn(path.read_text(encoding="utf-8"), None, None, turn.max_tokens, turn.pause_s)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{scenario}: cannot read the prompt {path}: {error}") from error
