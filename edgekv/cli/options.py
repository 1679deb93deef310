"""Settings as options of a command: the range, the error and the words that complete come from :mod:`edgekv.settings`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import typer

from edgekv.errors import UsageError
from edgekv.settings import PROFILE, Choice, Mode, Setting, Whole

T = TypeVar("T")


class _NotAsAsked(typer.BadParameter):
    """A value that a setting refuses; the message says all. It must not be a ValueError, which typer would reword."""

    def format_message(self) -> str:
        return str(self.message)


def option(setting: Setting[Any], *names: str, help: str, **rest: Any) -> Any:
    """Return an option of a command that takes what a setting takes.

    Args:
        names: as for :func:`typer.Option`, the long one first.
        rest: further arguments of :func:`typer.Option`.
    """
    if "autocompletion" not in rest and (words := _words_of(setting)) is not None:
        rest["autocompletion"] = beginning_with(words)
    rest.setdefault("metavar", setting.metavar)
    return typer.Option(*names, help=help, parser=reader(setting, names[0]), **rest)


def argument(setting: Setting[Any], metavar: str, *, help: str, **rest: Any) -> Any:
    """Return an argument of a command that takes what a setting takes."""
    return typer.Argument(metavar=metavar, help=help, parser=reader(setting, metavar), **rest)


def reader(setting: Setting[T], said: str) -> Callable[[object], T]:
    """Return a function that reads a text, or checks a default, and refuses by name."""

    def read(value: object) -> T:
        try:
            return setting.read(value, said) if isinstance(value, str) else setting.check(value, said)
        except UsageError as error:
            raise _NotAsAsked(str(error)) from error

    return read


def whole(name: str, least: int, most: int = 2**31 - 1) -> Whole:
    """Return a setting of one command alone: a whole number."""
    return Whole(name, least, most)


def profile_names() -> Sequence[str]:
    """Return the names of the device profiles."""
    from edgekv.device_profiles import names

    return names()


def beginning_with(words: Callable[[], Sequence[str]], *, listed: bool = False) -> Callable[[str], list[str]]:
    """Return what completes a word to one of some; ``listed``: the last of several with commas between."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",") if listed else ("", "", incomplete)
        return [f"{before}{comma}{word}" for word in words() if word.startswith(last)]

    return complete


def _words_of(setting: Setting[Any]) -> Callable[[], Sequence[str]] | None:
    if setting is PROFILE:
        return profile_names
    return (lambda: setting.metavar.split("|")) if isinstance(setting, (Choice, Mode)) else None
