"""What a person types into a conversation: with line editing, a history, and messages of several lines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from edgekv.files import make_own_folder, open_file, read_own, replace_own
from edgekv.host import user_folder

from .typed import FENCE, is_open, is_yes, unfenced

if TYPE_CHECKING:
    from typing import TextIO

#: Messages that the history keeps.
LONGEST_HISTORY = 1000


def history_file() -> Path:
    """Return where the history of conversations is kept."""
    return user_folder("XDG_STATE_HOME", ".local/state") / "chat_history"


class Editor:
    """Reads messages from the terminal that is stdin.

    Args:
        shown: the terminal that shows what is typed.
        words: what Tab completes at the beginning of a message.
        history: the file that keeps what was typed; None: nothing is kept.
    """

    hint = f"Alt-Enter begins another line of the message; a message between two {FENCE} may have several, too."

    def __init__(self, shown: TextIO, words: Sequence[str], history: Path | None) -> None:
        self._output = create_output(stdout=shown)
        self._session: PromptSession[str] = PromptSession(
            [("bold", "> ")],
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            history=InMemoryHistory() if history is None else KeptHistory(history),
            completer=WordCompleter(words, sentence=True),
            complete_while_typing=False,
            output=self._output,
        )

    def read(self) -> str | None:
        """Return a message, None at Ctrl-D.

        Raises:
            KeyboardInterrupt: Ctrl-C where nothing was typed.
        """
        try:
            text = self._session.prompt(handle_sigint=False)  # the command has handlers of its own
        except EOFError:
            return None
        return unfenced(text)

    def agrees(self, question: str) -> bool:
        """Ask; Enter is yes."""
        try:
            answer = PromptSession[str](output=self._output).prompt(f"{question} [Y/n] ", handle_sigint=False)
        except (EOFError, KeyboardInterrupt):
            return False
        return is_yes(answer)


def _keys() -> KeyBindings:
    keys, typing = KeyBindings(), has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        if is_open(event.current_buffer.text):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=typing)
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys


class KeptHistory(History):
    """A history in a file of this user alone: one message per line, as JSON. What cannot be kept ends with the process."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def load_history_strings(self) -> Iterable[str]:
        """Return what was typed, the newest first."""
        try:
            lines = read_own(self._path).splitlines()
            if len(lines) > 2 * LONGEST_HISTORY:
                replace_own(self._path, b"\n".join([*lines[-LONGEST_HISTORY:], b""]))
        except FileNotFoundError:
            return []
        except OSError as error:
            self._say(error)
            return []
        return _texts(reversed(lines[-LONGEST_HISTORY:]))

    def store_string(self, string: str) -> None:
        """Keep what was typed."""
        try:
            make_own_folder(self._path.parent)
            with os.fdopen(open_file(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, own=True), "ab") as stream:
                stream.write(json.dumps(string).encode() + b"\n")
        except OSError as error:
            self._say(error)

    def _say(self, error: OSError) -> None:
        print(f"edgekv: what is typed is not kept in {self._path}: {error.strerror}", file=sys.stderr)


def _texts(lines: Iterable[bytes]) -> Iterator[str]:
    for line in lines:
        try:
            text = json.loads(line)
        except ValueError:  # a process that was killed left half a line
            continue
        if isinstance(text, str):
            yield text
