"""Files made by earlier versions still open and give the tokens that they gave then; tests/data/README.md says what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.sessions.tools import verify
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


@pytest.fixture
def session(tmp_path: Path) -> Path:
    """A copy of the session, which a run changes."""
    return Path(shutil.copytree(DATA / "session-1", tmp_path / "chat.kv"))


def test_a_bundle_of_format_1_gives_the_tokens_that_it_gave_when_it_was_made() -> None:
    with opened(None) as generator:
        assert list(generator.tokens(EXPECTED["prompt"], max_tokens=24)) == EXPECTED["answer"]


def test_a_session_of_format_1_goes_on_where_it_was_and_computes_one_token_again(session: Path) -> None:
    with opened(session) as generator:
        assert generator.session is not None
        assert generator.session.tokens == EXPECTED["prompt"] + EXPECTED["answer"][:12]
        assert list(generator.tokens(generator.session.tokens, max_tokens=12)) == EXPECTED["answer"][12:]
        assert (generator.session.reused_tokens, generator.session.computed_tokens) == (51, 1)
    assert verify(session) == ([], 64)


def test_a_wear_ledger_of_earlier_days_is_read_without_damage(session: Path) -> None:
    entries, damaged = read_ledger(session)
    assert (sum(entry.bytes_written for entry in entries), damaged) == (EXPECTED["written"], 0)
