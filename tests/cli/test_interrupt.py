"""A run that is asked to end: Ctrl-C at any moment, SIGTERM, a reader of its output that goes away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.sessions.session import Session
from edgekv.tiers import KVMode

Bundle = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
STORY = ["--prompt", "It was a dark night", "-n", "2000"]


@contextmanager
def started(*arguments: str | Path, stdin: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[str]]:
    """Start a command; its pipe holds less than its story, so that it cannot end before it is heard on a busy machine."""
    with subprocess.Popen(
        [sys.executable, "-m", "edgekv", *map(str, arguments)],
        stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, pipesize=4096,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it is ignored, and stays so
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def heard(process: subprocess.Popen[str], characters: int) -> str:
    """Wait until a process has said so much (past the buffers of `communicate`)."""
    assert process.stdout is not None
    said = b""
    while len(said) < characters:
        more = os.read(process.stdout.fileno(), 4096)
        assert more, said
        said += more
    return said.decode()


@pytest.mark.slow
@pytest.mark.parametrize("count", [6, pytest.param(300, marks=[pytest.mark.exhaustive, pytest.mark.timeout(3600)])])
def test_ctrl_c_at_any_moment_ends_a_run_with_130_and_a_session_that_goes_on(
    bundle: Bundle, tmp_path: Path, count: int
) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.cli.interrupted",
        str(bundle("demo")),
        str(tmp_path),
        str(count),
        str(count),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["faults"] == []
    assert found["interrupted"] >= count * 2 // 3, found
    assert found["silent"], "no run was interrupted in its prompt"
    assert found["spoke"], "no run was interrupted while it spoke"


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGHUP, 129, "terminal")]
)
def test_a_terminated_run_says_so_in_one_line_and_saves_what_was_said(
    bundle: Bundle, tmp_path: Path, number: signal.Signals, code: int, word: str
) -> None:
    session = tmp_path / "story.kv"
    with started("run", bundle("demo"), *STORY, "--session", session) as process:
        begun = heard(process, 20)
        process.send_signal(number)
        rest, errors = process.communicate()
    assert process.returncode == code
    assert errors.count("\n") == 1
    assert word in errors
    assert f"the session {session} is saved" in errors
    kept = Session.open(SessionOptions(session), None, save=False)
    with Generator.open(bundle("demo"), RunOptions()) as generator:
        said = generator.text.decode(kept.tokens)
    kept.close()
    assert said.endswith((begun + rest).removesuffix("\n")[-40:])


def test_a_chat_keeps_the_partial_answer_as_what_was_answered(bundle: Bundle, tmp_path: Path) -> None:
    session = tmp_path / "chat.kv"
    with started("run", bundle("demo"), "--chat", "-n", "2000", "--session", session, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write("Tell me of the whale\n")
        process.stdin.flush()
        begun = heard(process, 12)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate()
    assert process.returncode == 130, errors
    kept = Session.open(SessionOptions(session), None, save=False)
    assert [message["role"] for message in kept.notes["messages"]] == ["user", "assistant"]
    assert kept.notes["messages"][1]["content"] == (begun + rest).removesuffix("\n")
    kept.close()


@pytest.mark.parametrize("session", [False, True])
def test_a_reader_that_has_enough_ends_a_run_without_a_word(bundle: Bundle, tmp_path: Path, session: bool) -> None:
    kept = f"--session '{tmp_path / 's.kv'}'" if session else ""
    run = f"'{sys.executable}' -m edgekv run '{bundle('demo')}' --prompt 'It was' -n 1500 -q {kept}"
    result = subprocess.run(
        ["bash", "-c", f"{run} | head -c 20; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 141
    assert len(result.stdout) == 20
    assert result.stderr == ""


def test_a_signal_that_was_ignored_before_stays_ignored(bundle: Bundle) -> None:
    run = f"'{sys.executable}' -m edgekv run '{bundle('demo')}' --prompt 'It was' -n 30 -q"
    ignoring = f"trap '' INT; {run} & sleep 0.4; kill -INT $!; wait $!"
    result = subprocess.run(["bash", "-c", ignoring], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_a_second_signal_at_once_is_the_same_one(bundle: Bundle, tmp_path: Path) -> None:
    with started("run", bundle("demo"), *STORY, "--session", tmp_path / "s.kv") as process:
        heard(process, 20)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert "is saved" in process.communicate()[1]
    assert process.returncode in (130, 143)


def test_a_signal_that_comes_in_a_destructor_is_not_lost() -> None:
    program = """
import os, signal, time
from edgekv.cli.interrupt import Interrupted, Signals

class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(100))  # here the signal is seen, and nothing that is raised gets out

signals = Signals()
signals.watch()
try:
    last = Last()
    del last
    time.sleep(5)
except Interrupted as end:
    print(end)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (result.stdout, result.stderr, result.returncode) == ("interrupted\n", "", 0)


@pytest.mark.parametrize(
    "options", [{}, {"kv": KVMode.INT8, "kv_budget": "50%"}, {"attend": "selective:8", "kv_budget": "70%"}]
)
def test_no_step_compares_an_enumeration_with_a_number(bundle: Bundle, options: dict[str, object]) -> None:
    entered: set[str] = set()

    def enters(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and os.path.basename(frame.f_code.co_filename) == "enum.py":
            assert frame.f_back is not None
            entered.add(f"{frame.f_back.f_code.co_filename}:{frame.f_back.f_lineno}")

    with Generator.open(bundle("demo"), RunOptions(**options)) as generator:  # type: ignore[arg-type]
        steps = generator.tokens(generator.text.encode("It was a dark night " * 40), max_tokens=40)
        next(steps)
        sys.setprofile(enters)
        try:
            assert len(list(steps)) > 20
        finally:
            sys.setprofile(None)
    assert entered == set()
