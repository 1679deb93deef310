"""Results depend on tokens, model and options, to the bit: not on what is saved, cached, on flash or resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekv.runtime.add_prefix import add_prefix
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.tiers import KVMode
from tests.cases import seldom

Bundle = Callable[..., Path]
Logits = list[NDArray[np.float32]]

CHUNK = 64
#: Prompts that end before, at and behind a cut of the prefill, and at and beside the end of a page.
LENGTHS = (33, 64, 150, 263)
#: Every run takes the one that ends in the middle of a page, slow tests the one that ends where a step does.
OFTEN = [
    pytest.param(33, marks=pytest.mark.exhaustive),
    pytest.param(64, marks=pytest.mark.slow),
    150,
    pytest.param(263, marks=pytest.mark.exhaustive),
]
#: The longest prompt and what is generated after it, one by one.
MANY: list[int] = np.random.default_rng(0).integers(2, 1000, 300).tolist()
ANSWER: list[int] = np.random.default_rng(1).integers(2, 1000, 24).tolist()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(folder: Path, session: Path | None = None, every: int = 16, **options: object) -> Generator:
    settings = {"threads": 2, "prefill_chunk": CHUNK, "kv": KVMode.INT8, "context": 400, **options}
    kept = SessionOptions(session, checkpoint_tokens=every) if session is not None else None
    return Generator.open(folder, RunOptions(session=kept, **settings))  # type: ignore[arg-type]


def logits(generator: Generator, prompt: list[int], answer: list[int] = ANSWER) -> Logits:
    """Read a prompt and then an answer token by token."""
    first = generator.prefill(prompt, max_tokens=len(answer)).copy()
    return [first, *(generator.step([token]).copy() for token in answer)]


def equal(got: Logits, expected: Logits) -> None:
    for mine, right in zip(got, expected, strict=True):
        np.testing.assert_array_equal(mine, right)


def killed(generator: Generator) -> None:
    """Let a generator end as kill -9 would end it."""
    generator._abandon_session()
    generator.close()


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> dict[int, Logits]:
    """What runs give that save nothing, have all pages in RAM and never stopped."""
    results = {}
    for length in LENGTHS:
        with opened(bundle("demo"), prefixes=False) as generator:
            results[length] = logits(generator, MANY[:length])
    return results


@pytest.mark.parametrize("length", OFTEN)
def test_saving_offloading_and_a_prefix_change_no_bit(
    length: int, bundle: Bundle, tmp_path: Path, expected: dict[int, Logits]
) -> None:
    folder, prompt = bundle("demo"), MANY[:length]
    ways: dict[str, dict[str, object]] = {
        "a session": {"session": tmp_path / "a.kv"},
        "a session, never saved": {"session": tmp_path / "b.kv", "every": 0},
        "flash": {"kv_budget": "30%"},
        "flash, chosen by the budget": {"kv_budget": "30%", "kv": KVMode.AUTO},
        "a session on flash": {"session": tmp_path / "c.kv", "kv_budget": "30%"},
    }
    for way, options in ways.items():
        with opened(folder, **options) as generator:  # type: ignore[arg-type]
            equal(logits(generator, prompt), expected[length])
            assert generator.report().reused_tokens == 0, way
    _, kept = add_prefix(folder, [*MANY[:200], 7], RunOptions(threads=2, prefill_chunk=CHUNK))
    for way, options in {"nothing": {}, **ways}.items():
        if "session" in options:
            options["session"] = tmp_path / f"{way} and a prefix.kv"
        with opened(folder, **options) as generator:  # type: ignore[arg-type]
            equal(logits(generator, prompt), expected[length])
            assert generator.report().reused_tokens == min(kept, (length - 1) // CHUNK * CHUNK), way


def test_fp16_pages_are_the_same_with_a_prefix_that_is_of_int8_pages(bundle: Bundle) -> None:
    folder = bundle("demo")
    with opened(folder, kv=KVMode.AUTO) as generator:
        right = logits(generator, MANY)
    add_prefix(folder, MANY, RunOptions(threads=2, prefill_chunk=CHUNK))
    with opened(folder, kv=KVMode.AUTO) as generator:
        equal(logits(generator, MANY), right)
        assert generator.report().unused_prefix_tokens == 256


@pytest.mark.parametrize("end", ["in order", "killed", "killed, saved by token"])
@pytest.mark.parametrize("length", OFTEN)
def test_a_resumed_run_has_the_bits_of_the_one_that_never_stopped(
    length: int, end: str, bundle: Bundle, tmp_path: Path, expected: dict[int, Logits]
) -> None:
    folder, prompt = bundle("demo"), MANY[:length]
    every = 1 if end.endswith("token") else 16
    for said in (0, 1, 15, 16):
        path = tmp_path / f"{said}.kv"
        generator = opened(folder, path, every)
        logits(generator, prompt, ANSWER[:said])
        generator.close() if end == "in order" else killed(generator)
        with opened(folder, path, every) as generator:
            assert generator.session is not None
            known = max(generator.session.tokens, prompt, key=len)  # what was not saved is generated again
            assert known == (prompt + ANSWER[:said])[: len(known)]
            said_before = len(known) - length
            equal(logits(generator, known, ANSWER[said_before:]), expected[length][said_before:])


@pytest.mark.parametrize("length", OFTEN)
def test_a_prefill_that_was_interrupted_again_and_again_has_the_same_bits(
    length: int, bundle: Bundle, tmp_path: Path, expected: dict[int, Logits]
) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(done: int, total: int) -> None:
        raise Interrupted

    for kill in (False, True):
        path, prompt = tmp_path / f"{kill}.kv", MANY[:length]
        for _ in range(6):  # at most one step in each run
            generator = opened(bundle("demo"), path)
            with contextlib.suppress(Interrupted):
                generator.prefill(prompt, max_tokens=0, progress=interrupt)
            killed(generator) if kill else generator.close()
        with opened(bundle("demo"), path) as generator:
            equal(logits(generator, prompt), expected[length])


@pytest.mark.parametrize("session", [False, True])
@pytest.mark.parametrize("change", seldom([40, 64, 262], but=[64]))
def test_an_edited_prompt_has_the_bits_of_a_fresh_one(
    change: int, session: bool, bundle: Bundle, tmp_path: Path
) -> None:
    folder, before = bundle("demo"), MANY[:263]
    edited = [*before[:change], 7, *before[change + 1 :], 8, 9]
    with opened(folder) as generator:
        right = logits(generator, edited)
    with opened(folder, tmp_path / "a.kv" if session else None) as generator:
        logits(generator, before)
        equal(logits(generator, edited), right)
        assert generator.report().reused_tokens == change // CHUNK * CHUNK
    if session:
        with opened(folder, tmp_path / "a.kv") as generator:
            equal(logits(generator, [*edited[:-1], 10])[:0], [])
            assert generator.report().reused_tokens == (len(edited) - 1) // CHUNK * CHUNK


def test_a_conversation_is_the_same_saved_or_not_and_resumed_between_any_turns(bundle: Bundle, tmp_path: Path) -> None:
    """Its turns go on from the steps of the turns before, generated tokens included."""
    folder = bundle("demo")
    turns: list[list[int]] = []
    sequence: list[int] = []
    for length in (70, 5, 90):
        sequence = [*sequence, *MANY[len(sequence) : len(sequence) + length]]
        turns.append(list(sequence))
        sequence += ANSWER
        turns.append(sequence[:-4])  # as if the answer were cut: what is behind it goes
    with opened(folder) as generator:
        right = [logits(generator, turn) for turn in turns]
    for end in ("not", "in order", "killed"):
        path = tmp_path / f"{end}.kv"
        generator = opened(folder, path)
        for turn, expected in zip(turns, right, strict=True):
            equal(logits(generator, turn), expected)
            if end == "killed":
                generator.save()
                killed(generator)
            elif end == "in order":
                generator.close()
            if end != "not":
                generator = opened(folder, path)
        generator.close()


def test_a_chunk_that_is_no_multiple_of_a_page_changes_nothing_of_that(bundle: Bundle, tmp_path: Path) -> None:
    folder, prompt = bundle("demo"), MANY[:200]
    with opened(folder, prefill_chunk=40, prefixes=False) as generator:
        right = logits(generator, prompt)
    _, kept = add_prefix(folder, prompt, RunOptions(threads=2, prefill_chunk=40))
    assert kept == 160
    for said in (0, 3, 9):
        path = tmp_path / f"{said}.kv"
        generator = opened(folder, path, prefill_chunk=40)
        equal(logits(generator, prompt, ANSWER[:said]), right[: said + 1])
        assert generator.report().reused_tokens == 160
        generator.save()
        killed(generator)
        with opened(folder, path, prefill_chunk=40) as generator:
            equal(logits(generator, prompt + ANSWER[:said], ANSWER[said:]), right[said:])


@pytest.mark.parametrize("place", seldom(["own file", "session", "flash and an object store"], but=["own file"]))
def test_a_second_text_of_a_generator_is_what_a_fresh_one_gives(place: str, bundle: Bundle, tmp_path: Path) -> None:
    """Records of the first text's pages are written again with the second's, also where the first had them read ahead."""
    # So few pages that the second text's come to lie like the first one's, and a guess of what is read next looks right.
    folder, size = bundle("demo", page_size=32), 280 * 1024
    texts = [np.random.default_rng(seed).integers(5, 1000, 200).tolist() for seed in range(3)]
    answers = []
    for text in texts:
        with opened(folder, prefixes=False, context=1000, prefill_chunk=256) as generator:
            answers.append(logits(generator, text, ANSWER[:6]))
    options: dict[str, object] = {"kv_budget": size, "context": 1000, "prefill_chunk": 256}
    if place == "flash and an object store":
        options |= {"offload": f"file://{tmp_path}/objects", "flash_limit": 64 * 1024}
    session = tmp_path / "a.kv" if place == "session" else None
    with opened(folder, session, **options) as generator:  # type: ignore[arg-type]
        for text, expected in zip(texts, answers, strict=True):
            equal(logits(generator, text, ANSWER[:6]), expected)
            list(generator.tokens(text, max_tokens=20))
        assert generator.report().pages.pages_fetched  # type: ignore[union-attr]


def test_logits_of_a_step_stay_what_they_were_when_the_next_one_comes(bundle: Bundle) -> None:
    with opened(bundle("demo")) as generator, generator.fork(generator.options) as other:
        first = [generator.prefill(MANY[:20], max_tokens=9), *(generator.step([token]) for token in ANSWER[:3])]
        kept = [one.copy() for one in first]
        other.prefill(MANY[:30], max_tokens=1)
        generator.step([7])
        equal(first, kept)
