"""Files made by earlier versions still open and give the tokens that they gave then; tests/data/README.md says what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekv.bundle import read_manifest
from edgekv.errors import SessionMismatch
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.sessions.folder import read_state
from edgekv.runtime.sessions.index import FORMAT
from edgekv.runtime.sessions.session import Session
from edgekv.runtime.sessions.tools import compact, copy, describe, fork, verify
from edgekv.runtime.storage.wear import read_ledger
from edgekv.tiers import KVMode

DATA = Path(__file__).parent / "data"
EXPECTED: dict[str, Any] = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))


@contextmanager
def opened(session: Path | None) -> Iterator[Generator]:
    kept = SessionOptions(session) if session else None
    options = RunOptions(threads=2, kv=KVMode.INT8, session=kept, prefixes=False)
    with Generator.open(DATA / "bundle-1", options) as generator:
        yield generator


@pytest.mark.parametrize("kv", [KVMode.INT8, KVMode.FP16])
def test_an_inline_bundle_of_contract_1_gives_the_tokens_that_it_gave_when_it_was_made(kv: KVMode) -> None:
    with Generator.open(DATA / "inline-1", RunOptions(threads=2, kv=kv, prefixes=False)) as generator:
        assert list(generator.tokens(EXPECTED["prompt"], max_tokens=18)) == EXPECTED["inline_answer"]
        assert generator.score(EXPECTED["prompt"]).shape == (40, 320)


@pytest.mark.parametrize("kv", [KVMode.INT8, KVMode.FP16])
def test_an_inline_program_of_contract_1_gives_the_tokens_that_it_gave_when_it_was_made(kv: KVMode) -> None:
    pytest.importorskip("executorch", reason="the extra `executorch` is not installed")
    with Generator.open(DATA / "inline-executorch-1", RunOptions(threads=2, kv=kv, prefixes=False)) as generator:
        assert list(generator.tokens(EXPECTED["executorch_prompt"], max_tokens=12)) == EXPECTED["executorch_answer"]


def test_an_inline_bundle_of_contract_1_follows_its_budget_though_it_promises_equal_layers() -> None:
    options = RunOptions(threads=2, kv=KVMode.FP16, context=512, prefixes=False)
    with Generator.open(DATA / "inline-1", options) as generator:
        steps = generator.tokens(EXPECTED["prompt"] * 5, max_tokens=60)
        tokens = [next(steps)]
        assert generator.budget is not None
        for share in (0.5, 0.3, 0.6):  # layers give up different numbers of pages
            generator.set_budget(int(generator.budget.budget_bytes * share))
            tokens += [next(steps) for _ in range(18)]
        assert len(tokens) == 55


SESSIONS = pytest.mark.parametrize("session", ["session-1", "session-2"], indirect=True)


@pytest.fixture
def session(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a session, which a run changes."""
    return Path(shutil.copytree(DATA / getattr(request, "param", "session-1"), tmp_path / "chat.kv"))


def version(path: Path) -> int:
    meta = read_state(path, None).meta
    assert meta is not None
    return meta.format


def test_a_bundle_of_format_1_gives_the_tokens_that_it_gave_when_it_was_made() -> None:
    with opened(None) as generator:
        assert list(generator.tokens(EXPECTED["prompt"], max_tokens=24)) == EXPECTED["answer"]


@SESSIONS
def test_a_session_goes_on_where_it_was_computes_one_token_again_and_is_of_the_newest_format(session: Path) -> None:
    with opened(session) as generator:
        assert generator.session is not None
        assert generator.session.tokens == EXPECTED["prompt"] + EXPECTED["answer"][:12]
        assert list(generator.tokens(generator.session.tokens, max_tokens=12)) == EXPECTED["answer"][12:]
        assert (generator.session.reused_tokens, generator.session.computed_tokens) == (51, 1)
    assert verify(session) == ([], 64)
    assert version(session) == FORMAT
    with opened(session) as generator:
        assert generator.session is not None
        assert list(generator.tokens(generator.session.tokens, max_tokens=1)) != []
        assert generator.session.computed_tokens == 1


def test_a_session_of_format_1_stays_one_for_who_has_no_bundle(session: Path, tmp_path: Path) -> None:
    assert describe(session)["problems"] == []
    fork(session, tmp_path / "fork.kv")
    copy(session, tmp_path / "copy.kv")
    compact(session)
    for path in (session, tmp_path / "fork.kv", tmp_path / "copy.kv"):
        assert version(path) == 1
        assert verify(path) == ([], 52)
        with opened(path) as generator:
            assert generator.session is not None
            assert list(generator.tokens(generator.session.tokens, max_tokens=12)) == EXPECTED["answer"][12:]
            assert (generator.session.reused_tokens, generator.session.computed_tokens) == (51, 1)
        assert version(path) == FORMAT


def test_a_session_of_format_1_that_is_not_saved_again_stays_as_it_was(session: Path) -> None:
    before = (session / "index.sqlite").read_bytes()
    with opened(session) as generator:
        assert generator.session is not None
        generator.session.abandon()
    assert (session / "index.sqlite").read_bytes() == before
    assert version(session) == 1


@SESSIONS
def test_a_session_of_another_model_is_refused_whatever_its_format(session: Path) -> None:
    manifest = read_manifest(DATA / "bundle-1")
    rope = replace(manifest.model.rope, attention_scaling=1.5)
    other = replace(manifest, model=replace(manifest.model, rope=rope))
    with pytest.raises(SessionMismatch, match=r"rope [0-9a-f]{12,16}, this bundle [0-9a-f]{12,16}"):
        Session.open(SessionOptions(session), other)
    Session.open(SessionOptions(session), manifest).abandon()


@SESSIONS
def test_a_wear_ledger_of_earlier_days_is_read_without_damage(session: Path) -> None:
    entries, damaged = read_ledger(session)
    assert (sum(entry.bytes_written for entry in entries), damaged) == (EXPECTED["written"], 0)
