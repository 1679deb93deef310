"""A session whose tokens were pruned: what is gone stays gone when it is resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.sessions.index import Tail, from_ranges, to_ranges
from edgekv.runtime.sessions.session import Session
from edgekv.runtime.sessions.tools import compact, verify
from edgekv.runtime.storage.segments import segment_paths
from edgekv.schema import from_json
from edgekv.tiers import KVMode, Tier
from tests.cases import seldom

Bundle = Callable[..., Path]
PROMPT: list[int] = np.random.default_rng(0).integers(2, 1000, 150).tolist()


def opened(folder: Path, path: Path | None, **options: object) -> Generator:
    session = SessionOptions(path, checkpoint_tokens=16) if path else None
    return Generator.open(folder, RunOptions(threads=2, session=session, kv=KVMode.INT8, **options))  # type: ignore[arg-type]


def pruned_positions(size: int, n_kv: int) -> np.ndarray:
    """Some tokens here and there, a whole sealed page, and the first tokens of the open one."""
    sealed = n_kv // size * size
    return np.concatenate([[3, 4, 5, 40, 77], np.arange(2 * size, 3 * size), np.arange(sealed, sealed + 3)])


@pytest.mark.parametrize("budget", seldom([None, "60%"], but=["60%"]))
@pytest.mark.parametrize("form", ["split", "inline"])
def test_pruned_tokens_stay_pruned_and_the_text_is_that_of_a_run_that_never_stopped(
    form: str, budget: str | None, bundle: Bundle, tmp_path: Path
) -> None:
    folder, path = bundle("demo", form), tmp_path / "chat.kv"
    with opened(folder, None, context=400) as whole:
        said = list(whole.tokens(PROMPT, max_tokens=20))
        assert whole.cache is not None
        gone = pruned_positions(whole.manifest.page_size, 169)
        whole.cache.prune(gone)
        tokens = PROMPT + said
        expected = [list(whole.tokens(tokens, max_tokens=30))]
        expected.append(whole.cache.table.tokens[:, :199].tolist())
    with opened(folder, path, kv_budget=budget, context=400) as generator:
        assert list(generator.tokens(PROMPT, max_tokens=20)) == said
        assert generator.cache is not None
        generator.cache.prune(gone)
    assert verify(path) == ([], 170)
    with opened(folder, path, kv_budget=budget, context=400) as generator:
        assert list(generator.tokens(tokens, max_tokens=30)) == expected[0]
        assert generator.report().reused_tokens == 169
        assert generator.cache is not None
        assert generator.cache.table.tokens[:, :199].tolist() == expected[1]
        assert (generator.cache.table.tier[:, 2] == Tier.FREE).all()
        generator.cache.check()
    compact(path)
    with opened(folder, path) as generator:  # and once more, from what the resumed run saved
        generator.prefill([*tokens, *expected[0]], max_tokens=1)
        assert generator.cache is not None
        assert generator.cache.table.tokens[:, :199].tolist() == expected[1]


def test_an_open_page_without_a_token_left_is_resumed_as_one(bundle: Bundle, tmp_path: Path) -> None:
    folder, path = bundle("demo"), tmp_path / "chat.kv"
    with opened(folder, None, context=400) as whole, opened(folder, path, context=400) as generator:
        expected = []
        for run in (whole, generator):
            run.prefill(PROMPT, max_tokens=4)
            assert run.cache is not None
            size = run.manifest.page_size
            run.cache.prune(np.arange(len(PROMPT) // size * size, len(PROMPT)))
        expected = [whole.step([token]).copy() for token in (6, 7, 8)]
    with opened(folder, path, context=400) as generator:
        mine = [generator.prefill([*PROMPT, 6], max_tokens=3).copy(), *(generator.step([t]).copy() for t in (7, 8))]
        assert generator.report().reused_tokens == len(PROMPT)
        generator.cache.check()  # type: ignore[union-attr]
    for logits, right in zip(mine, expected, strict=True):
        np.testing.assert_array_equal(logits, right)


def flip_a_bit(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("which", ["open page", "sealed page"])
def test_tokens_that_are_computed_again_because_of_damage_stay_pruned(
    which: str, bundle: Bundle, tmp_path: Path
) -> None:
    folder, path = bundle("demo"), tmp_path / "chat.kv"
    with opened(folder, path, context=400) as generator:
        generator.prefill(PROMPT, max_tokens=4)
        assert generator.cache is not None
        size = generator.manifest.page_size
        gone = np.concatenate([[3, 3 * size + 1], np.arange(len(PROMPT) // size * size, len(PROMPT) - 2)])
        generator.cache.prune(gone)
        expected = generator.cache.table.tokens[:, : len(PROMPT)].tolist()
    with contextlib.closing(Session.open(SessionOptions(path), None, save=False)) as session:
        records = session.state.tail.records if which == "open page" else session.state.rows[2].records
        segment, place = divmod(records[0], 1 << 32)
        flip_a_bit(segment_paths(path)[segment], place * session.store.spec.record_bytes + 100)
    for attempt in range(2):  # what the first one saved is whole again
        with opened(folder, path, context=400) as generator:
            generator.prefill([*PROMPT, 6, 7], max_tokens=4)
            assert generator.cache is not None
            assert generator.cache.table.tokens[:, : len(PROMPT)].tolist() == expected
            generator.cache.check()
            assert generator.session is not None
            assert len(generator.session.problems) == 1 - attempt


CASES = [(form, kind) for form in ("split", "inline") for kind in ("fp16", "int8", "session")]
SPAN = np.arange(21, 53)


def begun(folder: Path, kind: str, path: Path, **options: object) -> Generator:
    if kind == "session":
        return opened(folder, path, **options)
    return Generator.open(folder, RunOptions(threads=2, kv=KVMode(kind), **options))  # type: ignore[arg-type]


def live(generator: Generator) -> list[list[int]]:
    """Of each layer the positions that are in the cache and were not pruned."""
    assert generator.cache is not None
    generator.cache.check()
    table = generator.cache.table
    return [sorted(set(row[: table.n_slots[layer]].tolist()) - {-1}) for layer, row in enumerate(table.tokens)]


def left(generator: Generator, n_kv: int, gone: np.ndarray = SPAN) -> list[list[int]]:
    """What :func:`live` is of ``n_kv`` tokens of which some were pruned."""
    return [np.setdiff1d(np.arange(n_kv), gone).tolist()] * generator.manifest.model.n_layers


@pytest.mark.parametrize("back", ["another prompt", "go_back"])
@pytest.mark.parametrize(
    ("form", "kind"), seldom(CASES, but=[("split", "session"), ("split", "fp16"), ("inline", "int8")])
)
def test_pruned_tokens_that_are_cut_off_and_computed_again_stay_pruned(
    form: str, kind: str, back: str, bundle: Bundle, tmp_path: Path
) -> None:
    folder, prompt = bundle("demo", form), PROMPT[:100]
    with begun(folder, kind, tmp_path / "chat.kv", context=400) as generator:
        generator.prefill(prompt, max_tokens=100)
        assert generator.cache is not None
        generator.cache.prune(SPAN)
        generator.step(PROMPT[100:140])
        if back == "go_back":
            generator.go_back(prompt)
        mine = [generator.prefill([*prompt, 7], max_tokens=100).copy()]
        assert generator.report().prefill_tokens > 100 + 40  # else nothing was cut off
        assert live(generator) == left(generator, 101)
        mine.append(generator.step([8]))
    with opened(folder, tmp_path / "other.kv", context=400) as generator:  # the same, but for a process between
        generator.prefill(prompt, max_tokens=100)
        assert generator.cache is not None
        generator.cache.prune(SPAN)
        generator.step(PROMPT[100:140])
    with opened(folder, tmp_path / "other.kv", context=400) as generator:
        expected = [generator.prefill([*prompt, 7], max_tokens=100).copy(), generator.step([8])]
    if kind != "fp16":
        for logits, right in zip(mine, expected, strict=True):
            np.testing.assert_array_equal(logits, right)


def test_a_session_that_went_back_behind_its_pruned_tokens_is_saved_so_and_prunes_them_when_they_come_again(
    bundle: Bundle, tmp_path: Path
) -> None:
    folder, path = bundle("demo"), tmp_path / "chat.kv"
    with opened(folder, path, context=400) as generator:
        generator.prefill(PROMPT[:100], max_tokens=100)
        assert generator.cache is not None
        generator.cache.prune(SPAN)
        generator.step(PROMPT[100:140])
        generator.go_back(PROMPT[:100])
        assert live(generator) == left(generator, 0)
    assert verify(path) == ([], 100)
    with contextlib.closing(Session.open(SessionOptions(path), None, save=False)) as session:
        assert session.tokens == PROMPT[:100]
        assert from_ranges(session.state.tail.pruned).tolist() == SPAN.tolist()
    with opened(folder, path, context=400) as generator:
        generator.prefill([*PROMPT[:100], 7], max_tokens=10)
        assert live(generator) == left(generator, 101)


def test_a_token_of_another_text_is_not_pruned_since_one_at_its_place_was(bundle: Bundle, tmp_path: Path) -> None:
    with opened(bundle("demo"), tmp_path / "chat.kv", context=400) as generator:
        generator.prefill(PROMPT[:100], max_tokens=100)
        assert generator.cache is not None
        generator.cache.prune(SPAN)
        generator.step(PROMPT[100:140])
        generator.prefill([*PROMPT[:30], *PROMPT[31:120]], max_tokens=100)
        assert live(generator) == left(generator, 119, np.arange(21, 30))


@pytest.mark.parametrize("kind", ["int8", "session"])
def test_a_step_that_fails_and_takes_a_sealed_page_with_it_leaves_pruned_tokens_pruned(
    kind: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begun(bundle("demo"), kind, tmp_path / "chat.kv", context=400) as generator:
        generator.prefill(PROMPT[:100], max_tokens=100)
        assert generator.cache is not None
        assert generator.prepared is not None
        generator.cache.prune(SPAN)
        compute = generator.prepared.forward.step

        def fail(*arguments: Any) -> None:
            compute(*arguments)
            raise InterruptedError

        with monkeypatch.context() as patch:
            patch.setattr(generator.prepared.forward, "step", fail)
            with pytest.raises(InterruptedError):
                generator.step(PROMPT[100:140])
        assert generator.cache.table.n_slots.tolist() == [0] * generator.manifest.model.n_layers
        generator.step([7])
        assert live(generator) == left(generator, 101)


@pytest.mark.parametrize("how", ["prefill", "score"])
def test_tokens_stay_pruned_in_a_longer_cache(how: str, bundle: Bundle, tmp_path: Path) -> None:
    with begun(bundle("demo"), "int8", tmp_path) as generator:
        generator.prefill(PROMPT[:100], max_tokens=1)
        before = generator.cache
        assert before is not None
        before.prune(SPAN)
        if how == "prefill":
            generator.prefill(PROMPT, max_tokens=100)
        else:
            generator.score(PROMPT[100:])
        assert generator.cache is not before
        assert live(generator) == left(generator, len(PROMPT))


def test_the_index_of_before_is_read_as_one_where_nothing_was_pruned() -> None:
    fields = dataclasses.asdict(Tail(3, (1, 2), 50, (48,)))
    del fields["pruned"]
    assert from_json(json.dumps(fields).encode(), Tail) == Tail(3, (1, 2), 50, (48,))


@given(st.sets(st.integers(0, 60)))
def test_ranges_say_what_the_positions_said(positions: set[int]) -> None:
    assert set(from_ranges(to_ranges(sorted(positions))).tolist()) == positions
