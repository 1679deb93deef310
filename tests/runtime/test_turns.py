"""Who may use a generator: one thread at a time, and of the texts that it has begun only the last goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgekv.errors import UsageError
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.tiers import PressureMode
from tests.cases import seldom

FIRST, SECOND = list(range(20, 60)), list(range(120, 150))


@pytest.fixture
def folder(bundle: Callable[..., Path], checkpoint: Callable[[str], Path]) -> Path:
    return bundle(checkpoint("llama"))


@pytest.fixture
def generator(folder: Path) -> Iterator[Generator]:
    with Generator.open(folder, RunOptions(threads=1, pressure=PressureMode.IGNORE)) as opened:
        yield opened


def alone(generator: Generator, prompt: list[int], count: int = 8) -> list[int]:
    return list(generator.tokens(prompt, max_tokens=count))


def elsewhere(call: Callable[[], object]) -> BaseException | None:
    """Call on another thread, and return what it raised."""
    raised: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            raised.append(None)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0]


def test_of_two_texts_by_turns_the_first_says_that_it_cannot_go_on_and_the_second_is_right(
    generator: Generator,
) -> None:
    expected = alone(generator, SECOND)
    first = generator.tokens(FIRST, max_tokens=8)
    next(first)
    second = generator.tokens(SECOND, max_tokens=8)
    got = [next(second)]
    with pytest.raises(UsageError, match=r"cannot go on.*Generator\.fork\(\)"):
        next(first)
    assert got + list(second) == expected


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda generator: generator.prefill(SECOND, max_tokens=4),
        lambda generator: generator.step([7]),
        lambda generator: generator.score([7, 8]),
        lambda generator: generator.prepare(900, 50),
        lambda generator: generator.close(),
    ],
    ids=["prefill", "step", "score", "prepare", "close"],
)
def test_a_text_whose_cache_changed_says_so(generator: Generator, meanwhile: Callable[[Generator], object]) -> None:
    text = generator.tokens(FIRST, max_tokens=8)
    next(text)
    meanwhile(generator)
    with pytest.raises(UsageError, match=r"cannot go on|was closed"):
        next(text)


def test_a_text_goes_on_after_what_leaves_its_tokens_alone(generator: Generator) -> None:
    expected = alone(generator, FIRST)
    text = generator.tokens(FIRST, max_tokens=8)
    got = [next(text)]
    generator.on_pressure("none")
    generator.save()
    generator.report()
    other = generator.fork(generator.options)
    alone(other, SECOND)
    other.close()
    assert got + list(text) == expected


def test_texts_of_forks_go_on_by_turns(generator: Generator) -> None:
    expected = [alone(generator, prompt) for prompt in (FIRST, SECOND)]
    with generator.fork(generator.options) as other:
        texts = [generator.tokens(FIRST, max_tokens=8), other.tokens(SECOND, max_tokens=8)]
        got = [[next(text) for text in texts] for _ in range(8)]
    assert [list(tokens) for tokens in zip(*got, strict=True)] == expected


def test_a_second_thread_gets_one_clear_error_and_the_first_is_unharmed(generator: Generator) -> None:
    expected = alone(generator, FIRST)
    text = generator.tokens(FIRST, max_tokens=8)
    got = [next(text)]
    raised = elsewhere(lambda: alone(generator, SECOND))
    assert isinstance(raised, UsageError)
    assert "another thread takes tokens" in str(raised)
    assert got + list(text) == expected
    assert elsewhere(lambda: alone(generator, SECOND)) is None, "the first text is over"


def test_no_other_thread_enters_while_a_call_is_on(generator: Generator) -> None:
    raised: list[BaseException | None] = []

    def progress(done: int, total: int) -> None:
        with generator.fork(generator.options) as other:  # the same thread may
            calls: list[Callable[[], object]] = [
                lambda: alone(generator, SECOND),
                lambda: generator.step([3]),
                lambda: generator.set_budget("1MiB"),
                lambda: generator.save(),
                lambda: alone(other, SECOND),
            ]
            raised.extend(map(elsewhere, calls))

    expected = alone(generator, FIRST)
    generator.prefill(SECOND, max_tokens=2)
    assert list(generator.tokens(FIRST, max_tokens=8, progress=progress)) == expected
    assert len(raised) == 5
    assert {str(error) for error in raised} == {
        "another thread is using this generator, or a fork of it; open one for each thread, or let them take turns"
    }


def test_a_text_may_be_taken_by_one_thread_after_another(generator: Generator) -> None:
    expected = alone(generator, FIRST)
    text = generator.tokens(FIRST, max_tokens=8)
    got: list[int] = []
    while len(got) < 8:
        assert elsewhere(lambda: got.append(next(text))) is None
    assert got == expected


def test_who_closes_from_another_thread_waits_for_the_step_and_the_text_says_that_it_was_closed(folder: Path) -> None:
    generator = Generator.open(folder, RunOptions(threads=1, prefill_chunk=16))
    closer = threading.Thread(target=generator.close)

    def progress(done: int, total: int) -> None:
        if not closer.is_alive() and closer.ident is None:
            closer.start()
            closer.join(0.2)
            assert closer.is_alive(), "it closed in the middle of a call"

    with pytest.raises(UsageError, match="closed in the middle of a call"):
        list(generator.tokens(FIRST, max_tokens=8, progress=progress))
    closer.join()
    assert generator.cache is None
    with pytest.raises(UsageError, match="was closed"):
        alone(generator, FIRST)
    generator.close()


def test_a_session_is_saved_when_another_thread_closes_it(folder: Path, tmp_path: Path) -> None:
    options = RunOptions(threads=1, session=SessionOptions(tmp_path / "a.kv"))
    generator = Generator.open(folder, options)
    text = generator.tokens(FIRST, max_tokens=8)
    for _ in range(4):
        next(text)
    assert elsewhere(generator.close) is None
    with Generator.open(folder, options) as again:
        assert again.session is not None
        assert again.session.tokens[: len(FIRST)] == FIRST


def test_a_generator_that_is_forgotten_keeps_neither_descriptors_nor_its_session(folder: Path, tmp_path: Path) -> None:
    options = RunOptions(threads=1, session=SessionOptions(tmp_path / "a.kv"))
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    for _ in range(5):
        generator = Generator.open(folder, options)  # would be refused as long as the one before it has the session
        alone(generator, FIRST)
        del generator
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # the engine's own


PROGRAM = """
import os, sys, threading, time
from edgekv.runtime.generate import Generator, RunOptions
generator = Generator.open(sys.argv[1], RunOptions(threads=2))
"""
EXITS = {
    "a text that is not over": "text = generator.tokens(range(20, 60), max_tokens=8); next(text)",
    "a thread in the middle of a step": """
ready = threading.Event()
def go():
    while True:
        for token in generator.tokens(range(20, 380), max_tokens=100, progress=lambda *_: ready.set()):
            pass
threading.excepthook = lambda args: print(args.exc_value, file=sys.stderr)
threading.Thread(target=go, daemon=True).start()
ready.wait()
""",
    "a forked child that forgets it": """
text = generator.tokens(range(20, 60), max_tokens=8)
next(text)
child = os.fork()
if not child:
    try:
        next(text)
    except Exception as error:
        print(error)
    del generator, text
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
list(text)
""",
}


@pytest.mark.parametrize("how", EXITS)
def test_a_process_ends_cleanly_with(how: str, folder: Path) -> None:
    if "fork" in how and not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    command = [sys.executable, "-c", PROGRAM + EXITS[how], str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stderr in (
        "",
        "this generator was closed in the middle of a call\n",
        "this generator was closed; open the bundle again\n",
    )
    if "fork" in how:
        assert (
            run.stdout
            == "a forked process cannot use the generator of its parent, whose threads it does not have: open it after the fork\n"
        )


LONG = [token % 250 for token in range(600)]  # three steps of prefill
NESTED: dict[str, Callable[[Generator], object]] = {
    "stream": lambda generator: list(generator.stream("It", max_tokens=3)),
    "tokens": lambda generator: alone(generator, SECOND),
    "a text that is left": lambda generator: next(generator.tokens(SECOND, max_tokens=3)),
    "prefill": lambda generator: generator.prefill([5, 6, 7], max_tokens=0),
    "step": lambda generator: generator.step([5]),
    "score": lambda generator: generator.score([5, 6]),
    "prepare": lambda generator: generator.prepare(900, 50),
    "close": lambda generator: generator.close(),
}
OUTER: dict[str, Callable[[Generator, Callable[[int, int], None]], object]] = {
    "stream": lambda generator, progress: list(generator.stream(LONG, max_tokens=4, progress=progress)),
    "tokens": lambda generator, progress: list(generator.tokens(LONG, max_tokens=4, progress=progress)),
    "prefill": lambda generator, progress: generator.prefill(LONG, max_tokens=4, progress=progress),
}


@pytest.mark.parametrize(
    "when", [pytest.param(256, id="in the middle"), pytest.param(600, id="at the end", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("nested", NESTED)
@pytest.mark.parametrize("outer", seldom(OUTER, but=["stream"], mark=pytest.mark.exhaustive))
def test_a_callback_that_gives_the_generator_another_text_ends_the_one_it_was_called_for(
    outer: str, nested: str, when: int, folder: Path
) -> None:
    with Generator.open(folder, RunOptions(threads=1, pressure=PressureMode.IGNORE)) as generator:

        def progress(done: int, total: int) -> None:
            if done == when:
                NESTED[nested](generator)

        with pytest.raises(UsageError, match=r"this text cannot go on|closed in the middle of a call"):
            OUTER[outer](generator, progress)
        assert (
            generator.prepared is None
            or generator.sequence[:256] != LONG[:256]
            or nested in ("step", "score", "prepare")
        )


def test_a_session_holds_the_text_that_a_callback_began_and_nothing_of_the_one_that_it_ended(
    folder: Path, tmp_path: Path
) -> None:
    options = RunOptions(threads=1, session=SessionOptions(tmp_path / "a.kv"))
    with Generator.open(folder, options) as generator:
        answer: list[int] = []

        def progress(done: int, total: int) -> None:
            if not answer:
                answer.extend(alone(generator, SECOND))

        with pytest.raises(UsageError, match="cannot go on"):
            list(generator.tokens(LONG, max_tokens=8, progress=progress))
        assert generator.sequence == SECOND + answer
    with Generator.open(folder, options) as again:
        assert again.session is not None
        assert again.session.tokens == (SECOND + answer)[: len(again.session.tokens)]
        assert len(again.session.tokens) >= len(SECOND)


def test_a_callback_may_use_a_fork_and_what_leaves_the_text_alone(generator: Generator) -> None:
    expected = generator.prefill(LONG, max_tokens=8).copy()
    generator.prefill(SECOND, max_tokens=8)
    with generator.fork(generator.options) as other:

        def progress(done: int, total: int) -> None:
            alone(other, SECOND)
            generator.save()
            generator.on_pressure("none")

        assert generator.prefill(LONG, max_tokens=8, progress=progress).tolist() == expected.tolist()
