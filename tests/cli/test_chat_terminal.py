"""A conversation at a real terminal: what is typed can be edited and comes back, and an answer can be stopped."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekv.cli.editor import LONGEST_HISTORY, KeptHistory
from edgekv.runtime.sessions.tools import contents

Bundle = Callable[..., Path]
UP, BACKSPACE, ALT_ENTER, CTRL_C, CTRL_D = "\x1b[A", "\x7f", "\x1b\r", "\x03", "\x04"
PROMPT = re.compile(r"\n> ?$")
PATIENCE_S = 120.0
SECRET = "a secret of sixteen bytes"


class Terminal:
    """A conversation whose terminal is ours."""

    def __init__(self, handle: int, process: subprocess.Popen[bytes]) -> None:
        self._handle, self.process = handle, process
        self.shown = ""  # since the last that was waited for
        self._raw = b""

    def wait(self, what: str | re.Pattern[str] = PROMPT) -> str:
        """Wait until the terminal shows something, and return what it showed until then."""
        pattern = re.compile(re.escape(what)) if isinstance(what, str) else what
        end = time.monotonic() + PATIENCE_S
        while not pattern.search(self._plain()):
            assert time.monotonic() < end, self._plain()
            if select.select([self._handle], [], [], 1)[0]:
                try:
                    more = os.read(self._handle, 4096)
                except OSError:  # the process is gone
                    more = b""
                assert more, self._plain()
                self._raw += more
        shown, self._raw = self._plain(), b""
        return shown

    def type(self, text: str, *, enter: bool = True) -> None:
        os.write(self._handle, text.encode() + (b"\r" if enter else b""))

    def say(self, text: str) -> str:
        """Type a message, and return what is shown up to the next prompt."""
        self.type(text)
        return self.wait()

    def end(self) -> int:
        """Return the exit code."""
        while True:
            try:
                if not os.read(self._handle, 4096):
                    break
            except OSError:
                break
        return self.process.wait(PATIENCE_S)

    def _plain(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\b]", "", self._raw.decode(errors="replace"))


@contextmanager
def terminal(bundle: Path, state: Path, *options: str | Path) -> Iterator[Terminal]:
    leader, follower = pty.openpty()

    def begin() -> None:
        os.setsid()
        fcntl.ioctl(follower, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-m", "edgekv", "run", str(bundle), "--chat", "--quiet", *map(str, options)],
        stdin=follower, stdout=follower, stderr=follower, preexec_fn=begin,
        env={
            **os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "50", "PROMPT_TOOLKIT_NO_CPR": "1",
            "XDG_STATE_HOME": str(state), "EDGEKV_SESSION_KEY": SECRET,
        },
    )  # fmt: skip
    fcntl.ioctl(follower, termios.TIOCSWINSZ, b"\x32\x00\xc8\x00\x00\x00\x00\x00")
    os.close(follower)
    try:
        yield Terminal(leader, process)
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def asked(session: Path) -> list[str]:
    return [message["content"] for message in contents(session)["messages"] if message["role"] == "user"]


def test_what_is_typed_can_be_edited_and_comes_back_in_the_next_conversation(bundle: Bundle, tmp_path: Path) -> None:
    state, session = tmp_path / "state", tmp_path / "chat.kv"
    options = ("-n", "3", "--session", session)
    with terminal(bundle("demo"), state, *options) as first:
        first.wait()
        first.say("Hellp" + BACKSPACE + "o")
        first.type(CTRL_D, enter=False)
        assert first.end() == 0
    kept = state / "edgekv" / "chat_history"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    with terminal(bundle("demo"), state, *options) as second:
        second.wait()
        second.say(UP + " again")
        second.type("/exit")
        assert second.end() == 0
    assert asked(session) == ["Hello", "Hello again"]


def test_a_conversation_that_is_encrypted_leaves_no_history(bundle: Bundle, tmp_path: Path) -> None:
    with terminal(
        bundle("demo"), tmp_path / "state", "-n", "3", "--encrypt", "--session", tmp_path / "chat.kv"
    ) as talk:
        talk.wait()
        talk.say("My secret")
        talk.type("/exit")
        assert talk.end() == 0
    assert not (tmp_path / "state").exists()


def test_a_message_may_have_several_lines(bundle: Bundle, tmp_path: Path) -> None:
    session = tmp_path / "chat.kv"
    with terminal(bundle("demo"), tmp_path / "state", "-n", "3", "--session", session) as talk:
        talk.wait()
        talk.type("one" + ALT_ENTER, enter=False)
        talk.say("two")
        talk.type('"""three')
        talk.type("four")
        talk.say('five"""')
        talk.type("/exit")
        assert talk.end() == 0
    assert asked(session) == ["one\ntwo", "three\nfour\nfive"]


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation_and_ends_it_where_nothing_is_typed(
    bundle: Bundle, tmp_path: Path
) -> None:
    session = tmp_path / "chat.kv"
    with terminal(bundle("demo"), tmp_path / "state", "-n", "4000", "-t", "3", "--session", session) as talk:
        talk.wait()
        talk.type("Tell me of the whale")
        talk.wait(re.compile(r"tokens 0:00:00\s+\S(.|\n){20}"))
        talk.type(CTRL_C, enter=False)
        assert "Stopped; what was said stays in the conversation." in talk.wait()
        assert "no such setting" not in talk.say("/set max_tokens 3")
        talk.say("And then?")
        talk.type("half a thought", enter=False)
        talk.type(CTRL_C, enter=False)
        time.sleep(0.5)
        assert talk.process.poll() is None, "what was typed is cleared"
        talk.type(CTRL_C, enter=False)
        assert talk.end() == 130
    messages = contents(session)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[1]["content"]


def test_a_full_context_offers_to_drop_whole_turns_and_the_system_message_stays(bundle: Bundle, tmp_path: Path) -> None:
    session, long = tmp_path / "chat.kv", "It was a dark night and he went home. " * 4
    options = ("-n", "5", "--context", "200", "--system", "Be brief.", "--session", session)
    with terminal(bundle("demo"), tmp_path / "state", *options) as talk:
        talk.wait()
        assert "The answer was cut at 5 tokens; /set max_tokens 10" in talk.say("First, " + long)
        talk.say("Second, " + long)
        talk.type("Third, " + long)
        assert "its context is 200. Drop the oldest turn?" in talk.wait("[Y/n]")
        talk.type("n")
        assert "begin another conversation with /clear" in talk.wait()
        talk.type("Third, " + long)
        talk.wait("[Y/n]")
        talk.say("")
        talk.type("/exit")
        assert talk.end() == 0
    messages = contents(session)["messages"]
    assert (messages[0]["role"], messages[0]["content"]) == ("system", "Be brief.")
    assert messages[-2]["content"].startswith("Third, ")
    assert not any(message["content"].startswith("First, ") for message in messages)
    assert [message["role"] for message in messages[1:3]] == ["user", "assistant"]


def test_sigterm_at_the_prompt_ends_in_one_line_and_leaves_the_terminal_as_it_was(
    bundle: Bundle, tmp_path: Path
) -> None:
    with terminal(bundle("demo"), tmp_path / "state", "-n", "3") as talk:
        before = termios.tcgetattr(talk._handle)
        talk.wait()
        assert termios.tcgetattr(talk._handle) != before
        talk.process.terminate()
        talk.wait("edgekv: ended by SIGTERM")
        assert talk.end() == 143
        assert termios.tcgetattr(talk._handle) == before


def test_a_history_stays_small_and_survives_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "state" / "chat_history"
    history = KeptHistory(path)
    for number in range(3):
        history.store_string(f"line {number}\nand more")
    with path.open("ab") as stream:
        stream.write(b'"half a li')
    assert next(iter(KeptHistory(path).load_history_strings())) == "line 2\nand more"
    path.write_bytes(b"".join(json.dumps(str(number)).encode() + b"\n" for number in range(3 * LONGEST_HISTORY)))
    assert len(list(KeptHistory(path).load_history_strings())) == LONGEST_HISTORY
    assert len(path.read_bytes().splitlines()) == LONGEST_HISTORY


def test_a_history_that_is_a_link_is_refused_in_one_line(tmp_path: Path) -> None:
    target, path = tmp_path / "elsewhere", tmp_path / "chat_history"
    target.write_text("")
    path.symlink_to(target)
    history = KeptHistory(path)
    result: list[str] = list(history.load_history_strings())
    history.store_string("a secret")
    assert (result, target.read_text()) == ([], "")
