"""Messages that somebody types: where they come from, and how one has several lines."""

from __future__ import annotations

from typing import Protocol

from rich.console import Console
from rich.markup import escape

from .files import read_line

#: What stands around a message of several lines.
FENCE = '"""'


class Typist(Protocol):
    """Somebody at a terminal.

    Attributes:
        hint: how a message of several lines is typed.
    """

    hint: str

    def read(self) -> str | None:
        """Return a message, None at the end.

        Raises:
            KeyboardInterrupt: Ctrl-C where nothing was typed. UsageError: it is not UTF-8; the next one can be read.
        """

    def agrees(self, question: str) -> bool:
        """Ask; Enter is yes."""


class Lines:
    """Reads from a terminal that cannot show more than lines."""

    hint = f"A message between two {FENCE} may have several lines."

    def __init__(self, console: Console) -> None:
        self._console = console

    def read(self) -> str | None:
        """See :class:`Typist`."""
        self._console.print("[bold]>[/bold] ", end="")
        text = read_line()
        while text is not None and is_open(text) and (line := read_line()) is not None:
            text += f"\n{line}"
        return None if text is None else unfenced(text)

    def agrees(self, question: str) -> bool:
        """See :class:`Typist`."""
        self._console.print(escape(f"{question} [Y/n] "), end="")
        answer = read_line()
        return answer is not None and is_yes(answer)


def is_open(text: str) -> bool:
    """Say whether a message goes on in the next line."""
    return text.lstrip().startswith(FENCE) and text.count(FENCE) == 1


def unfenced(text: str) -> str:
    """Return a message without the marks around several lines."""
    if not text.lstrip().startswith(FENCE):
        return text
    return text.strip().removeprefix(FENCE).removesuffix(FENCE).strip("\n")


def is_yes(answer: str) -> bool:
    """Say whether an answer means yes."""
    return answer.strip().lower() in ("", "y", "yes")
