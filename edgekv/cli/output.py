"""What commands print: tables and sentences for people, JSON for scripts. What is piped is never wrapped."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape

#: Columns of a table that goes to a pipe or a file: no line is as long.
_PIPED_WIDTH = 100_000


class _Printer(Console):
    """A console whose reader may go away like that of any other program."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def stdout() -> Console:
    """Return a console that prints results."""
    return _printer(stderr=False)


def stderr() -> Console:
    """Return a console that prints everything else."""
    return _printer(stderr=True)


def _printer(*, stderr: bool) -> Console:
    console = _Printer(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    return console


def print_json(data: object) -> None:
    """Print data as JSON on stdout; a number that is not finite is null. ASCII, so that any stream takes it."""
    print(json.dumps(_finite(data), indent=1))


def print_json_line(data: object) -> None:
    """Print data as one line of JSON on stdout, at once."""
    print(json.dumps(_finite(data)), flush=True)


class Facts:
    """Names and values, a line each: a terminal may wrap it, but what is copied from it is one line."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str]] = []

    def add_row(self, name: str, value: str) -> None:
        """Add a line; the value may have markup of rich."""
        self._rows.append((name, value))

    def print(self, console: Console) -> None:
        """Print the lines, their values below each other."""
        width = max((len(name) for name, _ in self._rows), default=0)
        for name, value in self._rows:
            console.print(f"[bold]{escape(name.ljust(width))}[/bold]  {value}", soft_wrap=True)


def _finite(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
