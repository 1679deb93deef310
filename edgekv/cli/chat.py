"""`edgekv run --chat`: a conversation, one line per turn. A line that fails does not stay in it, and there is always a way on."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypedDict

from rich.console import Console
from rich.markup import escape

from edgekv.errors import EdgeKVError, FormatError, PromptTooLong, SessionError, UsageError
from edgekv.schema import checked

from .files import read_line
from .interrupt import Interrupted

if TYPE_CHECKING:
    from edgekv.runtime.generate import Generator
    from edgekv.runtime.sessions.session import Session

#: Answers tokens with at most so many new ones; prints the answer and adds it to the list.
Answer = Callable[[list[int], int, list[str]], None]
Message = dict[str, str]


class _Kept(TypedDict):
    role: str
    content: str


_COMMANDS = {
    "/help": "these words",
    "/new": "forget the conversation and begin another one",
    "/exit": "end; so does Ctrl-D",
}
#: A word that is no command is a slip, not a message; a path such as /etc/hosts is a message.
_COMMAND = re.compile(r"/[A-Za-z?]+(?!\S)")


def converse(
    generator: Generator, answer: Answer, console: Console, system: str | None, *, context: int, max_tokens: int
) -> None:
    """Hold a conversation with whoever writes lines to stdin, until they end.

    Args:
        context: tokens that it may have; an answer ends where they do.

    Raises:
        UsageError: not even a first message fits. Where stdin is not a terminal: any error of a turn, whose message does not
            stay in the session.
    """
    interactive = sys.stdin is not None and sys.stdin.isatty()
    messages = remembered(generator, system)
    _check_room(generator, messages[:1] if system else [], context)
    if interactive:
        console.print("One line per turn; Ctrl-D ends, /help says more.", style="dim")
    if messages and messages[-1]["role"] == "user":  # the process ended in the middle of the answer
        try:
            _take_turn(generator, messages, answer, console, context, max_tokens)
        except EdgeKVError as error:
            console.print(escape(f"edgekv: the last message was not answered and is forgotten: {error}"), style="red")
    while True:
        if interactive:
            console.print("[bold]>[/bold] ", end="")
        try:
            line = read_line()
            if line is None:
                return
            if not line.strip():
                continue
            if _COMMAND.match(line):  # a space before it makes a message of it
                if line.strip() == "/exit":
                    return
                _obey(line.strip(), messages, console)
                if generator.session is not None:  # a conversation that is forgotten must not come back
                    generator.session.save_notes()
                continue
            messages.append({"role": "user", "content": line.strip()})
            _take_turn(generator, messages, answer, console, context, max_tokens)
        except EdgeKVError as error:
            if not interactive:
                raise
            console.print(escape(f"edgekv: {error}"), style="red")


def remembered(generator: Generator, system: str | None) -> list[Message]:
    """Return the messages of the conversation so far; what is added to them is saved with the session.

    Raises:
        SessionError: those of the session are none.
    """
    messages = [{"role": "system", "content": system}] if system else []
    if generator.session is not None:
        kept = _kept(generator.session)
        messages += kept[1:] if kept and system and kept[0]["role"] == "system" else kept
        generator.session.notes["messages"] = messages
    return messages


def retell(generator: Generator) -> None:
    """Let the last answer of a session's conversation be what its tokens say, after a run that went on there.

    Where the tokens are another text, or the bundle knows no conversations, nothing changes.
    """
    session = generator.session
    if session is None:
        return
    kept = _kept(session)
    asked = kept[:-1] if kept and kept[-1]["role"] == "assistant" else kept
    if not asked:
        return
    try:
        tokens, sequence = generator.text.encode_chat(asked), generator.sequence
    except UsageError:  # a bundle without a template, or with another one that refuses them
        return
    if sequence[: len(tokens)] == tokens and len(sequence) > len(tokens):
        answer = generator.text.decode(sequence[len(tokens) :])
        session.notes["messages"] = [*asked, {"role": "assistant", "content": answer}]
        generator.save()


def _kept(session: Session) -> list[Message]:
    try:
        kept = checked(session.notes.get("messages", []), list[_Kept], "messages")
    except FormatError as error:
        raise SessionError(f"the session {session.path} holds no conversation ({error}); begin another one") from error
    return [{"role": message["role"], "content": message["content"]} for message in kept]


def _take_turn(
    generator: Generator, messages: list[Message], answer: Answer, console: Console, context: int, max_tokens: int
) -> None:
    """Answer the last message, and add the answer; a message that cannot be answered is taken back."""
    said: list[str] = []
    before = generator.sequence or (list(generator.session.tokens) if generator.session is not None else [])
    try:
        tokens = generator.text.encode_chat(messages)
        if len(tokens) >= context:
            raise PromptTooLong(
                f"with this message the conversation has {len(tokens)} tokens, and its context is {context}: shorten it, begin"
                f" another conversation with /new, or raise --context"
            )
        answer(tokens, max_tokens, said)
    except Interrupted:
        if said:
            messages.append({"role": "assistant", "content": "".join(said)})
        raise
    except BaseException:
        messages.pop()
        generator.go_back(before)
        raise
    messages.append({"role": "assistant", "content": "".join(said)})
    generator.save()
    if generator.stats.context_full:
        console.print(f"the context of {context} tokens is full: /new begins another conversation", style="yellow")


def _check_room(generator: Generator, messages: list[Message], context: int) -> None:
    needed = len(generator.text.encode_chat([*messages, {"role": "user", "content": "?"}])) + 1
    if needed > context:
        raise UsageError(
            f"a conversation does not fit a context of {context} tokens: a first message and its answer take {needed} at the"
            f" least; raise --context{' or shorten --system' if messages else ''}"
        )


def _obey(command: str, messages: list[Message], console: Console) -> None:
    if command == "/new":
        del messages[1 if messages and messages[0]["role"] == "system" else 0 :]
        console.print("A new conversation.", style="dim")
    elif command in ("/help", "/?"):
        for word, meaning in _COMMANDS.items():
            console.print(f"{word:6} {meaning}", style="dim")
    else:
        console.print(escape(f"edgekv: {command} is no command, and was not sent; /help lists them"), style="red")
        console.print("A line that begins with a space goes to the model.", style="dim")
