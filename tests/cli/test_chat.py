"""Conversations: no line keeps them from going on."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from edgekv.cli.chat import Manner, converse
from edgekv.cli.sampling import chosen
from edgekv.errors import StoreError
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.sessions.tools import contents

Bundle = Callable[..., Path]
LONG = "very " * 400 + "long\n"


def chat(bundle: Path, lines: str | bytes, *options: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "edgekv", "run", str(bundle), "--chat", "-n", "6", *map(str, options)],
        input=lines.encode() if isinstance(lines, str) else lines, capture_output=True, check=False,
    )  # fmt: skip


def typed(bundle: Path, lines: list[str], *options: str) -> tuple[int, str]:
    """Type lines into a terminal, each after the prompt for it; return the exit code and what the terminal showed."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "edgekv", "run", str(bundle), "--chat", "-n", "6", "--quiet", *options],
        stdin=follower, stdout=follower, stderr=follower, env={**os.environ, "TERM": "dumb", "COLUMNS": "200"},
    )  # fmt: skip
    os.close(follower)
    shown, told = b"", 0
    while process.poll() is None or told < len(lines):
        try:
            shown += os.read(leader, 4096)
        except OSError:
            break
        if shown.endswith(b"> ") and told < len(lines):
            os.write(leader, lines[told].encode() + b"\n")
            told += 1
            shown += b"\n"
    os.close(leader)
    return process.wait(), shown.decode()


def test_a_message_that_is_too_long_does_not_stay_in_the_session(bundle: Bundle, tmp_path: Path) -> None:
    session = tmp_path / "chat.kv"
    options = ("--session", session, "--context", "200", "--json")
    assert chat(bundle("demo"), "Call me Ishmael.\n", *options).returncode == 0
    refused = chat(bundle("demo"), LONG, *options)
    assert refused.returncode == 2
    assert refused.stderr.count(b"\n") == 1
    assert b"shorten it, begin another conversation with /clear, or raise --context" in refused.stderr
    after = chat(bundle("demo"), "Who am I?\n", *options)
    assert after.returncode == 0, after.stderr
    assert len(after.stdout.splitlines()) == 1


def test_a_message_whose_answer_fails_does_not_stay_in_the_sessions_text(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = tmp_path / "chat.kv"
    assert chat(bundle("demo"), "Call me Ishmael.\n", "--session", session).returncode == 0
    before = contents(session)["tokens"]
    options = RunOptions(session=SessionOptions(session), context=400)
    with Generator.open(bundle("demo"), options) as generator:

        def fails(tokens: list[int], pinned: int, _: list[str]) -> None:
            next(generator.tokens(tokens, max_tokens=9))
            raise StoreError("flash is gone")

        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Who am I?\n")))
        with pytest.raises(StoreError, match="flash is gone"):
            converse(generator, fails, Console(), None, context=400, manner=Manner(chosen({}, None, None), 9))
    assert contents(session)["tokens"] == before


def test_what_continue_adds_to_an_answer_is_part_of_the_conversation(bundle: Bundle, tmp_path: Path) -> None:
    session = tmp_path / "chat.kv"
    options = ("--session", str(session))
    first = chat(bundle("demo"), "Tell me the code\n", *options).stdout.decode().rstrip("\n")
    command = [sys.executable, "-m", "edgekv", "run", str(bundle("demo")), *options, "--continue", "-n", "9", "-q"]
    more = subprocess.run(command, capture_output=True, check=True, text=True).stdout.rstrip("\n")
    assert more
    assert [m["content"] for m in contents(session)["messages"]] == ["Tell me the code", first + more]
    again = chat(bundle("demo"), "And again\n", *options, "--json")
    assert json.loads(again.stdout)["session"]["discarded_tokens"] == 0
    kept = contents(session)
    assert kept["messages"][1]["content"] == first + more
    text = subprocess.run([*command, "-p", " and"], capture_output=True, check=True, text=True).stdout.rstrip("\n")
    assert contents(session)["messages"][-1]["content"] == kept["messages"][-1]["content"] + " and" + text
    subprocess.run([*command[:-4], "-p", "Once", "-n", "2", "-q"], capture_output=True, check=True)  # another text
    assert contents(session)["messages"][1]["content"] == first + more


def test_a_terminal_goes_on_after_every_kind_of_line(bundle: Bundle) -> None:
    lines = [LONG[:2001], "/help", "/nonsense", "Who am I?", "/clear", "And now?", "/exit"]
    code, shown = typed(bundle("demo"), lines, "--context", "300")
    assert code == 0
    assert "shorten it, begin another conversation with /clear" in shown
    assert "forget the conversation" in shown
    assert "/nonsense is no command, and was not sent" in shown
    assert "A new conversation." in shown
    assert "Traceback" not in shown


def test_words_that_are_no_command_are_not_sent_to_the_model_through_a_pipe_either(bundle: Bundle) -> None:
    result = chat(bundle("demo"), "/halp\n/help\nWho am I?\n /exit\n/exit\nWho?", "--json")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 2, "one answer to the question, one to the line that begins with a space"
    assert b"/halp is no command" in result.stderr


def test_a_path_is_a_message(bundle: Bundle) -> None:
    result = chat(bundle("demo"), "/etc/hosts is what?\n", "--json")
    assert len(result.stdout.splitlines()) == 1


def test_a_context_that_no_message_fits_says_so_before_the_first(bundle: Bundle) -> None:
    result = chat(bundle("demo"), "Hello\n", "--context", "4")
    assert result.returncode == 2
    assert b"a conversation does not fit a context of 4 tokens" in result.stderr
    assert b"raise --context" in result.stderr


def test_a_small_context_shortens_answers_until_it_is_full(bundle: Bundle) -> None:
    first = chat(bundle("demo"), "Hello\n", "--context", "24", "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["text"]
    talk = chat(bundle("demo"), "Hello\n" * 9, "--context", "40", "--json")
    assert talk.returncode == 2
    assert b"the context of 40 tokens is full" in talk.stderr or b"its context is 40" in talk.stderr
    assert talk.stdout


def test_a_conversation_through_a_pipe_that_begins_anew_has_no_end(bundle: Bundle) -> None:
    result = chat(bundle("demo"), "Hello\n/clear\n" * 6, "--context", "40", "--json")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 6


def test_a_conversation_that_was_forgotten_does_not_come_back_with_its_session(bundle: Bundle, tmp_path: Path) -> None:
    session = tmp_path / "chat.kv"
    for lines in ("my secret is 42\n", "/clear\n/exit\n", "hello\n"):
        assert chat(bundle("demo"), lines, "--session", session, "-n", "3").returncode == 0
    assert contents(session)["messages"][0]["content"] == "hello"


def test_an_old_message_that_cannot_be_answered_is_forgotten(bundle: Bundle, tmp_path: Path) -> None:
    session = tmp_path / "chat.kv"
    assert chat(bundle("demo"), "Hello\n", "--session", session).returncode == 0
    from edgekv.bundle import read_manifest
    from edgekv.runtime.generate import Generator, RunOptions
    from edgekv.runtime.options import SessionOptions

    with Generator.open(bundle("demo"), RunOptions(session=SessionOptions(session))) as generator:
        assert generator.session is not None
        generator.prefill(generator.session.tokens, max_tokens=0)
        generator.session.notes["messages"] = [{"role": "user", "content": LONG}]
    assert read_manifest(bundle("demo")).model.max_context > 400
    result = chat(bundle("demo"), "Who am I?\n", "--session", session, "--context", "200", "--json")
    assert result.returncode == 0, result.stderr
    assert b"the last message was not answered and is forgotten" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_a_line_that_is_not_utf8_is_refused_with_its_place(bundle: Bundle) -> None:
    result = chat(bundle("demo"), b"caf\xe9\n")
    assert result.returncode == 2
    assert b"it is not UTF-8 text" in result.stderr
    assert b"at byte 3" in result.stderr


def test_a_closed_stdin_is_one_line(bundle: Bundle) -> None:
    for how in ("--chat", "-f -"):
        command = f"{sys.executable} -m edgekv run '{bundle('demo')}' {how} <&-"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert result.stderr.startswith("edgekv: stdin is closed")


def test_the_system_message_can_be_set_and_shown_and_survives_clear(bundle: Bundle, tmp_path: Path) -> None:
    session = tmp_path / "chat.kv"
    lines = "/system\n/system Be brief.\nHello\n/clear\nWho?\n/system Be long.\n/system\n"
    result = chat(bundle("demo"), lines, "--session", session, "--json")
    assert result.returncode == 0, result.stderr
    assert b"There is no system message." in result.stderr
    assert result.stderr.rstrip().endswith(b"Be long.")
    assert [m["content"] for m in contents(session)["messages"] if m["role"] != "assistant"] == ["Be long.", "Who?"]


def test_a_conversation_that_was_saved_goes_on_where_it_is_loaded(bundle: Bundle, tmp_path: Path) -> None:
    file, other = tmp_path / "talk.json", tmp_path / "other.txt"
    other.write_text("not a conversation")
    first = chat(bundle("demo"), f"/system Be brief.\nHello\n/save {file}\nWho am I?\n", "--json")
    assert first.returncode == 0, first.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    assert [m["role"] for m in json.loads(file.read_text())] == ["system", "user", "assistant"]
    again = chat(bundle("demo"), f"/load {file}\nWho am I?\n/save {file}\n", "--json")
    assert json.loads(again.stdout)["text"] == json.loads(first.stdout.splitlines()[1])["text"]
    assert len(json.loads(file.read_text())) == 5
    for line, words in (
        (f"/save {other}", "holds no conversation"),
        (f"/load {other}", "holds no conversation"),
        (f"/load {tmp_path}/gone.json", "No such file"),
        ("/load", "say which file: /load FILE"),
        ("/clear all", "nothing follows /clear"),
    ):
        refused = chat(bundle("demo"), line + "\n")
        assert refused.returncode == 2
        assert words in refused.stderr.decode()
        assert refused.stderr.count(b"\n") == 1
    assert other.read_text() == "not a conversation"


def test_a_saved_question_is_answered_where_it_is_loaded(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text(json.dumps([{"role": "user", "content": "Hello"}]))
    asked = chat(bundle("demo"), f"/load {file}\n", "--json")
    assert json.loads(asked.stdout)["text"] == json.loads(chat(bundle("demo"), "Hello\n", "--json").stdout)["text"]


def test_how_answers_are_made_can_be_changed_in_between(bundle: Bundle) -> None:
    lines = "Hello\n/set temperature 0.7\n/set max-tokens 3\n/set seed 5\nHello again\n/set\n/stats\n"
    result = chat(bundle("demo"), lines, "--json")
    assert result.returncode == 0, result.stderr
    first, second = map(json.loads, result.stdout.splitlines())
    assert (first["sampling"]["temperature"], first["answer_tokens"]) == (0, 6)
    assert (second["sampling"]["temperature"], second["answer_tokens"], second["seed"]) == (0.7, 3, 5)
    assert second["sampling"]["from"]["temperature"] == "option"
    assert b"temperature 0.7; answers of 3 tokens at the most" in result.stderr
    assert b"peak memory" in result.stderr
    for line, words in (("/set top_p 2", "/set top_p must be"), ("/set heat 1", "there is no such setting")):
        refused = chat(bundle("demo"), line + "\n")
        assert (refused.returncode, words in refused.stderr.decode()) == (2, True)
