"""A prompt is a message to a model that chats, and a text to go on with for any other, or with --raw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekv.cli.main import run_command_line
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.sessions.tools import contents

from .test_sampling import run
from .test_sampling import sampled as sampled

Bundle = Callable[..., Path]
ASKED = "Who gives pages to programs?"
SYSTEM = "Be an operating system."


@pytest.fixture
def chatting(bundle: Bundle, checkpoint: Callable[[str], Path]) -> Path:
    return bundle(checkpoint("llama"))


def answered(folder: Path, *messages: tuple[str, str]) -> str:
    with Generator.open(folder, RunOptions(context=256)) as generator:
        said = [{"role": role, "content": content} for role, content in messages]
        return generator.chat(said, max_tokens=8).text


def test_a_prompt_to_a_chat_model_is_a_message(chatting: Path, tmp_path: Path) -> None:
    asked = run(chatting, "-p", ASKED)
    assert asked["chat_template"] is True
    assert asked["text"] == answered(chatting, ("user", ASKED))
    (tmp_path / "asked.txt").write_text(ASKED, encoding="utf-8")
    assert run(chatting, "-f", str(tmp_path / "asked.txt"))["text"] == asked["text"]
    with_system = run(chatting, "-p", ASKED, "--system", SYSTEM, "--pin-prompt")
    assert with_system["text"] == answered(chatting, ("system", SYSTEM), ("user", ASKED))
    assert with_system["cache"]["pinned_pages"] > 0


def test_a_raw_prompt_is_a_text_to_go_on_with(chatting: Path) -> None:
    raw = run(chatting, "-p", ASKED, "--raw")
    with Generator.open(chatting, RunOptions(context=256)) as generator:
        assert raw["text"] == "".join(generator.stream(ASKED, max_tokens=8))
        assert raw["prefill_tokens"] == len(generator.text.encode(ASKED))
    assert raw["chat_template"] is False


def test_a_prompt_to_a_model_that_does_not_chat_stays_a_text(bundle: Bundle) -> None:
    plain: dict[str, Any] = run(bundle("demo"), "-p", "It was a dark night")
    assert plain["chat_template"] is False
    assert plain["text"] == run(bundle("demo"), "-p", "It was a dark night", "--raw")["text"]


def test_a_message_is_sampled_as_the_makers_of_the_model_say_and_a_raw_prompt_is_not(sampled: Path) -> None:
    assert run(sampled, "-p", ASKED)["sampling"]["temperature"] == 0.9
    assert run(sampled, "-p", ASKED, "-t", "0")["sampling"]["temperature"] == 0
    raw = run(sampled, "-p", ASKED, "--raw")["sampling"]
    assert (raw["temperature"], raw["from"]["temperature"]) == (0, "default")


def test_what_is_continued_is_the_answer_and_a_text_is_added_as_it_is(chatting: Path, tmp_path: Path) -> None:
    session = str(tmp_path / "asked.kv")
    run(chatting, "-p", ASKED, "--session", session)
    before = contents(tmp_path / "asked.kv")["tokens"]
    assert run(chatting, "--continue", "--session", session)["session"]["discarded_tokens"] == 0
    more = run(chatting, "--continue", "-p", " and then", "--session", session)
    assert more["chat_template"] is False
    after = contents(tmp_path / "asked.kv")["tokens"]
    assert after[: len(before)] == before
    with Generator.open(chatting) as generator:
        assert " and then" in generator.text.decode(after[len(before) :])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--chat", "--raw"], "--raw is for prompts"),
        (["-p", "a", "--raw", "--system", "b"], "--system needs the chat template, which --raw does without"),
        (["-p", "a", "--system", "b"], "--system is a message, and this model knows no messages"),
    ],
)
def test_what_makes_no_sense_together_is_refused(
    options: list[str], words: str, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_line(["run", str(bundle("demo")), *options]) == 2
    assert words in capsys.readouterr().err
