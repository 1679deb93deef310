"""What commands print: tables and sentences for people, JSON for scripts. What is piped is never wrapped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
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
    """Print data as JSON on stdout; a number that is not finite is null."""
    print(json.dumps(_finite(data), indent=1, ensure_ascii=False))


def print_json_line(data: object) -> None:
    """Print data as one line of JSON on stdout, at once."""
    print(json.dumps(_finite(data)), flush=True)


def print_facts(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Print names and values, one line each, which a terminal may wrap but a copy of it does not."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        console.print(f"[bold]{escape(name.ljust(width))}[/bold]  {value}", soft_wrap=True)


def _finite(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
