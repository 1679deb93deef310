"""A scenario: what an app is asked to do on a device, and what happens meanwhile. One TOML file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from edgekv.errors import FormatError, UsageError
from edgekv.schema import Natural, Positive, Seconds, checked, file_within, one_of, plain_name, plain_toml, read_whole
from edgekv.tiers import KVMode

from ..events import Event

#: Tokens of one request, and how often a turn is repeated: lists of that many are made.
Tokens = Annotated[int, Meta(ge=1, le=1 << 24)]
Times = Annotated[int, Meta(ge=1, le=10_000)]


@dataclass(frozen=True)
class AppSettings:
    """How the app runs its model: as the options of ``edgekv run``, and how it behaves.

    ``context``: None is what all turns need together. ``session``: it keeps its conversation in a session, so that it goes on
    where it was after a kill. ``restart_s``: from a kill to its next start; ``restarts``: per turn at the most.
    """

    kv_budget: int | str | None = None
    kv: str = "auto"
    context: Positive | None = None
    policy: str = "lru"
    attend: str = "exact"
    allow_drop: bool = False
    session: bool = False
    checkpoint_tokens: Natural = 64
    prefill_chunk: Tokens = 256
    restart_s: Seconds = 2.0
    restarts: Natural = 3

    def __post_init__(self) -> None:
        one_of(self.kv, "kv", [mode.value for mode in KVMode])


@dataclass(frozen=True)
class Turn:
    """One request to the app and its answer. Turns are a conversation: each prompt is added to what was said before.

    ``prompt``: text; ``prompt_file``: its file, beside the scenario; ``prompt_tokens``: so many tokens, drawn by the seed.
    ``pause_s``: before it. ``repeat``: how often.
    """

    prompt: str | None = None
    prompt_file: str | None = None
    prompt_tokens: Tokens | None = None
    max_tokens: Tokens = 64
    pause_s: Seconds = 0.0
    repeat: Times = 1

    def __post_init__(self) -> None:
        given = [name for name in ("prompt", "prompt_file", "prompt_tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError("a turn needs one of prompt, prompt_file and prompt_tokens")


@dataclass(frozen=True)
class Scenario:
    """Turns of a conversation, and events by virtual time."""

    turns: tuple[Turn, ...]
    title: str = "one prompt"
    app: AppSettings = AppSettings()
    events: tuple[Event, ...] = ()


@dataclass(frozen=True)
class ScenarioFile:
    """What the TOML file of a scenario holds: the tables ``[app]``, ``[[turn]]`` and ``[[event]]``."""

    title: str | None = None
    app: AppSettings = AppSettings()
    turn: tuple[Turn, ...] = ()
    event: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        if not self.turn:
            raise FormatError("it has no [[turn]]: nothing is asked of the app")


def load_scenario(path: Path) -> Scenario:
    """Read a scenario.

    Raises:
        UsageError: the file cannot be read, or says something unknown or impossible; the message names the place.
    """
    try:
        file = checked(plain_toml(read_whole(path)), ScenarioFile)
        turns = [_with_file(turn, path.parent) for turn in file.turn]
    except OSError as error:
        raise UsageError(f"cannot read the scenario {path}: {error.strerror}") from error
    except FormatError as error:
        raise UsageError(f"the scenario {path}: {error}") from error
    return Scenario(
        turns=tuple(turn for turn in turns for _ in range(turn.repeat)),
        title=path.stem if file.title is None else file.title,
        app=file.app,
        events=file.event,
    )


def _with_file(turn: Turn, folder: Path) -> Turn:
    """Return a turn whose prompt is in a file, with its text."""
    if turn.prompt_file is None:
        return turn
    try:
        text = read_whole(file_within(folder, plain_name(turn.prompt_file, "prompt_file"))).decode()
    except OSError as error:
        raise FormatError(f"cannot read the prompt {turn.prompt_file} beside it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"the prompt {turn.prompt_file} is not UTF-8 text") from error
    return replace(turn, prompt=text, prompt_file=None)
