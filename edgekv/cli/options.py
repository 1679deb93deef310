"""Settings as options of a command: the range, the error and the words that complete come from :mod:`edgekv.settings`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import typer

from edgekv.errors import UsageError
from edgekv.settings import Choice, Mode, Setting, Whole

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
    if isinstance(setting, (Choice, Mode)) and "autocompletion" not in rest:
        rest["autocompletion"] = _beginning_with(setting.metavar.split("|"))
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


def _beginning_with(words: list[str]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete
