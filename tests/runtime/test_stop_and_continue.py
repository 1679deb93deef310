"""A session ends where the text ended that was given, and goes on from there, whatever the tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from edgekv.cli.main import app
from edgekv.cli.sessions import continued
from edgekv.errors import UsageError
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.sampling import SamplingOptions
from edgekv.runtime.sessions.tools import contents
from edgekv.runtime.text import REPLACEMENT
from edgekv.tiers import KVMode
from tests.cases import seldom
from tests.checkpoints import make_checkpoint
from tests.tokenizer_kinds import make_tokenizer, token_id

Bundle = Callable[..., Path]
#: Chooses widely, so that a random model says much.
WIDELY = SamplingOptions(temperature=1.5, seed=1)


@pytest.fixture(scope="module", params=seldom(["byte_level", "llama_2"], but=["byte_level"]))
def folder(request: pytest.FixtureRequest, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokenizer puts special tokens around a text."""
    tokenizer = make_tokenizer(request.param, ends=True)
    size = tokenizer.get_vocab_size()
    source = tmp_path_factory.mktemp("source")
    make_checkpoint(source, vocab_size=size, bos_token_id=token_id(tokenizer, "<s>"), eos_token_id=None)
    tokenizer.save(str(source / "tokenizer.json"))
    return bundle(source)


def opened(folder: Path, session: Path | None = None) -> Generator:
    kept = SessionOptions(session) if session is not None else None
    return Generator.open(folder, RunOptions(threads=2, session=kept, kv=KVMode.INT8, context=512))


def said(generator: Generator, prompt: list[int], count: int = 40, **options: Any) -> str:
    return "".join(generator.stream(prompt, max_tokens=count, **{"sampling": WIDELY, **options}))


def ids(generator: Generator, text: str) -> list[int]:
    return generator.text.encode_behind([], text)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_session_is_its_text_however_often_it_is_stopped_and_continued(
    data: st.DataObject, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("chat") / "a.kv"
    with opened(folder, path) as generator:
        prompt = ids(generator, "Hi there")
        whole = said(generator, prompt)
        printed, before = whole, generator.text.decode(prompt)
        generator.save()
    for _ in range(3):
        stop = data.draw(st.text(st.sampled_from("abeinrst. "), min_size=1, max_size=2))
        with opened(folder, path) as generator:
            assert generator.session is not None
            tokens = generator.session.tokens
            count = data.draw(st.integers(1, 30))
            printed += said(generator, tokens, count, stop=stop, before=tokens)
            held = generator.session.tokens
            assert held == generator.sequence
            text = generator.text.decode(held)
            generator.cache.check()  # type: ignore[union-attr]
        if REPLACEMENT not in text + printed:
            assert text == before + printed


@pytest.mark.parametrize("session", [False, True])
def test_what_stands_at_and_behind_the_stop_string_is_gone(session: bool, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.kv" if session else None
    with opened(folder, path) as generator:
        prompt = ids(generator, "Hi there")
        whole = said(generator, prompt, 60)
    stop = re.findall("[a-z]{2}", whole)[-1]
    visible = whole.partition(stop)[0]
    path = tmp_path / "b.kv" if session else None
    with opened(folder, path) as generator:
        assert said(generator, prompt, 60, stop=stop) == visible
        kept = generator.sequence
        assert generator.text.decode(kept) == generator.text.decode(prompt) + visible
        assert len(generator._tokens) <= len(kept)
        if generator.session is not None:
            assert generator.session.tokens == kept
        rest = said(generator, kept, 12, before=kept)
        expected = generator.sequence
    if path is not None:
        with opened(folder, tmp_path / "b.kv") as generator:
            assert generator.session is not None
            assert generator.session.tokens == expected
    with opened(folder) as generator:  # the same two turns, saved or not
        said(generator, prompt, 60, stop=stop)
        assert said(generator, kept, 12, before=kept) == rest


def test_a_stop_that_is_a_special_token_ends_text_and_session(folder: Path, tmp_path: Path) -> None:
    class Forced:
        """Chooses given tokens."""

        def __init__(self, tokens: list[int]) -> None:
            self.tokens = iter(tokens)

        def choose(self, logits: object, seen: object) -> int:
            return next(self.tokens)

    with opened(folder, tmp_path / "a.kv") as generator:
        end = next(number for number, name in generator.text.special.items() if name == "<|im_end|>")
        prompt, answer = ids(generator, "Hi"), ids(generator, " there")
        with pytest.MonkeyPatch.context() as patch:
            forced = Forced([*answer, end, *answer])
            patch.setattr("edgekv.runtime.generate.Sampler.choose", lambda self, *given: forced.choose(*given))
            assert said(generator, prompt, stop=["<|im_end|>"]) == generator.text.decode(answer)
        assert generator.session is not None
        assert generator.session.tokens == prompt + answer


def test_a_prompt_that_continues_a_session_loses_nothing(folder: Path, tmp_path: Path) -> None:
    """The tokenizer ends each text with a special token, and begins it with another: both belong to whole texts."""
    with opened(folder, tmp_path / "a.kv") as generator:
        said(generator, ids(generator, "Hi"), 4)
        assert generator.session is not None
        held = generator.session.tokens
        tokens = continued(generator, " there, isn't it over")
        assert tokens[: len(held)] == held
        added = generator.text.decode(tokens)[len(generator.text.decode(held)) :]
        assert added == " there, isn't it over"
        assert not set(tokens[len(held) :]) & set(generator.text.special)
        assert continued(generator, None) == continued(generator, "") == held
    with opened(folder, tmp_path / "new.kv") as generator:
        assert continued(generator, "Hi") == generator.text.encode("Hi"), "the first prompt is a whole text"
        with pytest.raises(UsageError, match="is empty: give it a --prompt first"):
            continued(generator, None)


def test_an_empty_prompt_begins_a_text_and_keeps_its_session_whole(folder: Path, tmp_path: Path) -> None:
    for session in (None, tmp_path / "a.kv"):
        with opened(folder, session) as generator:
            text = said(generator, [], 20)
            assert generator.sequence[0] == generator.manifest.model.bos_token_id
            assert len(generator.sequence) == 21
            assert text == generator.text.decode(generator.sequence)
            sequence = generator.sequence
    with opened(folder, tmp_path / "a.kv") as generator:
        assert generator.session is not None
        assert generator.session.tokens == sequence
        said(generator, sequence, 5)
        assert generator.sequence[:21] == sequence, "the last token is not generated twice"


def test_an_empty_prompt_for_a_model_that_begins_texts_with_nothing_says_so(folder: Path) -> None:
    with opened(folder) as generator:
        generator.manifest.model.__dict__["bos_token_id"] = None
        with pytest.raises(UsageError, match="the prompt is empty"):
            said(generator, [])


def test_a_resumed_session_draws_the_numbers_of_the_run_that_never_stopped(folder: Path, tmp_path: Path) -> None:
    with opened(folder) as generator:
        prompt = ids(generator, "Hi there")
        expected = list(generator.tokens(prompt, max_tokens=40, sampling=WIDELY))
    got: list[int] = []
    for count in (7, 13, 20):
        with opened(folder, tmp_path / "a.kv") as generator:
            assert generator.session is not None
            got += generator.tokens(generator.session.tokens or prompt, max_tokens=count, sampling=WIDELY)
    assert got == expected


def call(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_two_runs_without_a_seed_say_different_things_and_which_seed_says_it_again(folder: Path) -> None:
    run = ("run", str(folder), "-p", "Hi", "-n", "30", "-t", "1.5")
    first, second = call(*run), call(*run)
    assert first["text"] != second["text"]
    assert first["seed"] != second["seed"]
    assert call(*run, "--seed", str(first["seed"]))["text"] == first["text"]
    assert call("run", str(folder), "-p", "Hi", "-n", "3")["seed"] is None, "a greedy run draws nothing"


def test_runs_of_the_command_line_continue_each_others_text(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "story.kv"
    run = ("run", str(folder), "--raw", "--session", str(path), "-t", "1.5", "--seed", "5")
    text = call(*run, "-p", "Hi there", "-n", "12", "--stop", "e")["text"]
    text += call(*run, "--continue", "-n", "9", "--stop", "a", "--stop", "<|im_end|>")["text"]
    text += call(*run, "--continue", "-n", "12")["text"]
    with opened(folder) as generator:
        held = contents(path)["tokens"]
        prompt = generator.text.encode("Hi there")
        assert held[: len(prompt)] == prompt
        if REPLACEMENT not in text:
            assert generator.text.decode(held) == generator.text.decode(prompt) + text
    assert np.unique(held).size > 5


def test_a_turn_that_failed_is_gone_from_the_sequence_and_its_session(folder: Path, tmp_path: Path) -> None:
    def fails(done: int, _: int) -> None:
        raise RuntimeError("in the middle")

    with opened(folder, tmp_path / "a.kv") as generator:
        said(generator, ids(generator, "Hi there"))
        before = generator.sequence
    with opened(folder, tmp_path / "a.kv") as generator:
        assert generator.session is not None
        more = before + ids(generator, " what then? " * 9)
        with pytest.raises(RuntimeError, match="in the middle"):
            said(generator, more, progress=fails)
        answer = generator.tokens(more, max_tokens=9, sampling=WIDELY)
        next(answer)
        answer.close()
        assert generator.session.tokens[: len(more)] == more
        generator.go_back(before)
        assert generator.session.tokens == generator.sequence == before
        assert generator.cache is not None
        generator.cache.check()
    with opened(folder, tmp_path / "a.kv") as generator:
        assert generator.session is not None
        assert generator.session.tokens == before
        assert said(generator, before, before=before)
    with opened(folder) as generator:
        generator.go_back([1, 2])  # nothing was begun
        assert generator.sequence == []
