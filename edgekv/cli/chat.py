"""`edgekv run --chat`: a conversation. A message that fails does not stay in it, and there is always a way on."""

from __future__ import annotations

import bisect
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from rich.console import Console
from rich.markup import escape

from edgekv import settings
from edgekv.errors import EdgeKVError, FormatError, PromptTooLong, SessionError, UsageError
from edgekv.files import replace_own
from edgekv.schema import checked, did_you_mean, plain_json, read_whole

from .files import read_line
from .interrupt import Interrupted, Signals
from .output import Facts
from .sampling import SETTINGS, Sampling
from .typed import Lines, Typist

if TYPE_CHECKING:
    from edgekv.runtime.generate import Generator
    from edgekv.runtime.sessions.session import Session

#: Answers tokens, the first so many of them pinned; prints the answer and adds it to the list.
Answer = Callable[[list[int], int, list[str]], None]
Message = dict[str, str]


class _Kept(TypedDict):
    role: str
    content: str


@dataclass
class Manner:
    """How answers are made; ``/set`` changes it."""

    sampling: Sampling
    max_tokens: int

    def set(self, name: str, text: str) -> None:
        """Set a value from a text.

        Raises:
            UsageError: there is no such value, or it is out of range.
        """
        setting = _SETTABLE.get(name)
        if setting is None:
            raise UsageError(f"/set {name}: there is no such setting; {did_you_mean(name, _SETTABLE)}")
        value = setting.read(text, f"/set {name}")
        if setting is settings.MAX_TOKENS:
            self.max_tokens = int(value)
        else:
            self.sampling = self.sampling.with_option(name, value)

    def __str__(self) -> str:
        return f"{self.sampling}; answers of {self.max_tokens} tokens at the most"


_SETTABLE: dict[str, settings.Setting[int] | settings.Setting[float]] = {
    **SETTINGS, "seed": settings.SEED, "max_tokens": settings.MAX_TOKENS,
}  # fmt: skip


_HELP = {
    "/help": "these words",
    "/exit": "end; so does Ctrl-D",
    "/clear": "forget the conversation and begin another one; the system message stays",
    "/system TEXT": "set the system message; without TEXT, show it",
    "/save FILE": "write the conversation to FILE, as JSON, readable by you alone",
    "/load FILE": "go on with the conversation in FILE",
    "/set NAME VALUE": f"change how answers are made: {', '.join(_SETTABLE)}; without NAME, show it",
    "/stats": "what the run has done so far",
}
#: The words, and whether something follows them.
_COMMANDS = {line.split()[0]: " " in line for line in _HELP}
#: A word that is no command is a slip, not a message; a path such as /etc/hosts is a message.
_COMMAND = re.compile(r"/[A-Za-z?]+(?!\S)")


def converse(
    generator: Generator,
    answer: Answer,
    console: Console,
    system: str | None,
    *,
    context: int,
    manner: Manner,
    pin: bool = False,
    summary: Callable[[], Facts] = Facts,
    secret: bool = False,
    signals: Signals | None = None,
) -> None:
    """Hold a conversation with whoever writes to stdin, until they end.

    Args:
        context: tokens that it may have; an answer ends where they do.
        manner: how answers are made.
        pin: the system message must stay.
        summary: what /stats prints.
        secret: nothing of it is kept in the history.
        signals: those that stop an answer, and no more, where somebody sits at a terminal.

    Raises:
        UsageError: not even a first message fits. Where stdin is not a terminal: any error of a turn, whose message does not
            stay in the session.
    """
    _Conversation(
        generator,
        answer,
        console,
        system,
        context,
        manner,
        pin,
        summary,
        _typist(console, secret),
        signals or Signals(),
    ).hold()


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
        return _messages(session.notes.get("messages", []))
    except FormatError as error:
        raise SessionError(f"the session {session.path} holds no conversation ({error}); begin another one") from error


def _messages(data: object) -> list[Message]:
    """Return the messages that plain data holds.

    Raises:
        FormatError: it holds something else.
    """
    return [
        {"role": message["role"], "content": message["content"]} for message in checked(data, list[_Kept], "messages")
    ]


def _typist(console: Console, secret: bool) -> Typist | None:
    """Return who types; None: stdin is no terminal."""
    if sys.stdin is None or not sys.stdin.isatty():
        return None
    shown = next((stream for stream in (sys.stderr, sys.stdout) if stream.isatty()), None)
    if shown is None or os.environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return Lines(console)
    from .editor import Editor, history_file  # brings a library that pipes do without

    return Editor(shown, list(_COMMANDS), None if secret else history_file())


@dataclass
class _Conversation:
    generator: Generator
    answer: Answer
    console: Console
    system: str | None
    context: int
    manner: Manner
    pin: bool
    summary: Callable[[], Facts]
    typist: Typist | None
    signals: Signals
    messages: list[Message] = field(default_factory=list)

    def hold(self) -> None:
        self.messages = remembered(self.generator, self.system)
        self._check_room()
        if self.typist is not None:
            self._say("Enter sends a message; Ctrl-D ends, /help says more.")
        self._answer_pending()
        while (line := self._read()) is not None:
            try:
                if not line.strip():
                    continue
                if not _COMMAND.match(line):  # a space before it makes a message of it
                    self.messages.append({"role": "user", "content": line.strip()})
                    self._take_turn()
                elif line.strip() == "/exit":
                    return
                else:
                    self._obey(line.strip())
                    if self.generator.session is not None:  # a conversation that is forgotten must not come back
                        self.generator.session.save_notes()
            except EdgeKVError as error:
                if self.typist is None:
                    raise
                self._warn(f"edgekv: {error}")

    def _read(self) -> str | None:
        if self.typist is None:
            return read_line()
        while True:
            try:
                return self.typist.read()
            except KeyboardInterrupt:
                raise Interrupted(signal.SIGINT) from None
            except UsageError as error:  # a line that is not UTF-8
                self._warn(f"edgekv: {error}")

    # -- turns -------------------------------------------------------------------------------------------------

    def _answer_pending(self) -> None:
        """Answer what the process, or the file, ended in the middle of."""
        if not self.messages or self.messages[-1]["role"] != "user":
            return
        try:
            self._take_turn()
        except EdgeKVError as error:
            self._warn(f"edgekv: the last message was not answered and is forgotten: {error}")

    def _take_turn(self) -> None:
        """Answer the last message, and add the answer; a message that cannot be answered is taken back."""
        said: list[str] = []
        generator, session = self.generator, self.generator.session
        before = generator.sequence or (list(session.tokens) if session is not None else [])
        stopped = False
        try:
            tokens = self._fitting()
            self.answer(tokens, self._pinned(), said)
        except Interrupted as end:
            if self.typist is None or end.number != signal.SIGINT:
                if said:
                    self.messages.append({"role": "assistant", "content": "".join(said)})
                raise
            stopped = True
        except BaseException:
            self.messages.pop()
            generator.go_back(before)
            raise
        if stopped:
            self.signals.forget()
        if stopped and not said:
            self.messages.pop()
            generator.go_back(before)
            self._say("Stopped before the answer began; the message was taken back.")
            return
        self.messages.append({"role": "assistant", "content": "".join(said)})
        generator.save()
        if stopped:
            self._say("Stopped; what was said stays in the conversation.")
        elif generator.stats.context_full:
            way = "/clear begins another conversation" if self.typist is None else "the next message offers a way on"
            self.console.print(f"the context of {self.context} tokens is full: {way}", style="yellow")
        elif generator.stats.finish_reason == "length" and self.typist is not None:
            most = self.manner.max_tokens
            self._say(f"The answer was cut at {most} tokens; /set max_tokens {2 * most} allows longer ones.")

    def _pinned(self) -> int:
        from edgekv.runtime.chat import system_tokens

        system = self.pin and self.messages[0]["role"] == "system"
        return system_tokens(self.generator.text, self.messages) if system else 0

    def _fitting(self) -> list[int]:
        """Return the tokens of the conversation; where they leave too little room for an answer, offer to drop its oldest turns.

        Raises:
            PromptTooLong: they leave none.
        """
        tokens = self.generator.text.encode_chat(self.messages)
        if self.typist is not None:
            room = min(self.manner.max_tokens, max(1, self.context // 8))
            shorter = self._shortened(room) if len(tokens) + room > self.context else None
            if shorter is not None:
                count = sum(message["role"] == "user" for message in self.messages) - sum(
                    message["role"] == "user" for message in shorter
                )
                turns = "the oldest turn" if count == 1 else f"the {count} oldest turns"
                if self.typist.agrees(
                    f"The conversation has {len(tokens)} tokens, and its context is {self.context}. Drop {turns}?"
                ):
                    self.messages[:] = shorter
                    return self.generator.text.encode_chat(shorter)
        if len(tokens) >= self.context:
            raise PromptTooLong(
                f"with this message the conversation has {len(tokens)} tokens, and its context is {self.context}: shorten it,"
                " begin another conversation with /clear, or raise --context"
            )
        return tokens

    def _shortened(self, room: int) -> list[Message] | None:
        """Return the conversation without as many of its oldest turns as leave ``room`` for an answer; None: no way does."""
        first = 1 if self.messages[0]["role"] == "system" else 0
        head = self.messages[:first]
        turns = [at for at in range(first, len(self.messages)) if self.messages[at]["role"] == "user"]

        def fits(at: int) -> bool:
            return len(self.generator.text.encode_chat([*head, *self.messages[at:]])) + room <= self.context

        at = bisect.bisect_left(turns, True, lo=1, key=fits)
        return [*head, *self.messages[turns[at] :]] if at < len(turns) else None

    def _check_room(self) -> None:
        system = self.messages[:1] if self.messages and self.messages[0]["role"] == "system" else []
        needed = len(self.generator.text.encode_chat([*system, {"role": "user", "content": "?"}])) + 1
        if needed > self.context:
            raise UsageError(
                f"a conversation does not fit a context of {self.context} tokens: a first message and its answer take {needed} at"
                f" the least; raise --context{' or shorten the system message' if system else ''}"
            )

    # -- commands ----------------------------------------------------------------------------------------------

    def _obey(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word in ("/help", "/?"):
            for usage, meaning in _HELP.items():
                self._say(f"{usage:16} {meaning}")
            if self.typist is not None:
                self._say(self.typist.hint)
                self._say("Ctrl-C stops an answer and keeps the conversation; where nothing is typed, it ends.")
        elif word not in _COMMANDS:
            self._warn(f"edgekv: {word} is no command, and was not sent; /help lists them")
            self._say("A line that begins with a space goes to the model.")
        elif rest and not _COMMANDS[word]:
            raise UsageError(f"nothing follows {word}; a line that begins with a space goes to the model")
        elif word == "/clear":
            self._clear()
        elif word == "/stats":
            self.summary().print(self.console)
        elif word == "/system":
            self._set_system(rest)
        elif word == "/set":
            name, _, value = rest.partition(" ")
            if rest:
                self.manner.set(name.replace("-", "_"), value.strip())
            self._say(str(self.manner))
        elif not rest:
            raise UsageError(f"say which file: {word} FILE")
        elif word == "/save":
            self._save(Path(rest).expanduser())
        else:
            self._load(Path(rest).expanduser())

    def _clear(self) -> None:
        del self.messages[1 if self.messages and self.messages[0]["role"] == "system" else 0 :]
        self._say("A new conversation.")

    def _set_system(self, text: str) -> None:
        held = bool(self.messages) and self.messages[0]["role"] == "system"
        if not text:
            self._say(self.messages[0]["content"] if held else "There is no system message.")
            return
        before = list(self.messages)
        self.messages[: int(held)] = [{"role": "system", "content": text}]
        try:
            self._check_room()
        except UsageError:
            self.messages[:] = before
            raise
        self._say("The system message is set; the conversation goes on with it.")

    def _save(self, path: Path) -> None:
        if path.exists():
            _read_conversation(path)  # nothing else is written over
        try:
            replace_own(path, (json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n").encode())
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}; choose another file") from error
        self._say(f"{len(self.messages)} messages are in {path}.")

    def _load(self, path: Path) -> None:
        loaded, before = _read_conversation(path), list(self.messages)
        self.messages[:] = loaded
        try:
            self._check_room()
            self.generator.text.encode_chat([*loaded, *([] if loaded else [{"role": "user", "content": "?"}])])
        except UsageError:
            self.messages[:] = before
            raise
        self._say(f"The conversation in {path} goes on: {len(loaded)} messages.")
        self._answer_pending()

    def _say(self, text: str) -> None:
        self.console.print(escape(text), style="dim", highlight=False)

    def _warn(self, text: str) -> None:
        self.console.print(escape(text), style="red")


def _read_conversation(path: Path) -> list[Message]:
    try:
        return _messages(plain_json(read_whole(path)))
    except FormatError as error:
        raise UsageError(f"{path} holds no conversation: {error}") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
