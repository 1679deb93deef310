"""A program that knows sessions from docs/flash_format.md alone reads those of edgekv, and writes ones that it resumes."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import session_files
from session_files import SealedPage, Session, compatibility_key, read_session, shape_of, write_session

from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.sessions.folder import read_state
from edgekv.runtime.sessions.tools import contents, verify
from edgekv.runtime.storage.segments import segment_paths
from tests.cases import seldom

DATA = Path(__file__).parents[1] / "data"
BUNDLE = DATA / "bundle-1"
MANIFEST: dict[str, Any] = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))
EXPECTED: dict[str, Any] = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))
TOKENS: list[int] = EXPECTED["prompt"] + EXPECTED["answer"]
SECRET = b"a secret of more than sixteen bytes"


def go_on(path: Path, count: int, secret: bytes | None = None) -> tuple[list[int], int]:
    """Continue a session with ``count`` tokens; returns them, and how many tokens were computed to begin with."""
    options = RunOptions(threads=1, session=SessionOptions(path, secret=secret), prefixes=False)
    with Generator.open(BUNDLE, options) as generator:
        assert generator.session is not None
        tokens = list(generator.tokens(generator.session.tokens, max_tokens=count))
        return tokens, generator.session.computed_tokens


def make(path: Path, count: int, secret: bytes | None = None, pruned: Sequence[int] = ()) -> None:
    """Let edgekv write a session of ``count`` tokens, all of which have keys and values."""
    options = RunOptions(threads=1, session=SessionOptions(path, secret=secret), prefixes=False)
    with Generator.open(BUNDLE, options) as generator:
        prompt = TOKENS[: count - 1]
        generator.prefill(prompt, max_tokens=8)
        if pruned:
            assert generator.cache is not None
            generator.cache.prune(np.array(pruned))
        generator.step(TOKENS[count - 1 : count])
        generator.save(whole=True)


def payloads(path: Path, shape: session_files.Shape) -> dict[tuple[int, ...], bytes]:
    """Every page of a session as the bytes that its records hold, by place; plain sessions only."""
    found: dict[tuple[int, ...], bytes] = {}
    for file in segment_paths(path).values():
        data = file.read_bytes()
        for start in range(0, len(data), shape.record_bytes):
            _, _, _, page, layer, kind, n_bytes = session_files.HEADER.unpack_from(data, start)
            found[page, layer, kind] = data[start + 64 : start + 64 + n_bytes]
    return found


def test_it_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(session_files.__file__).read_text(encoding="utf-8"))
    names = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert names
    assert not [name for name in names if name and name.startswith(("edgekv", "tests"))]


def test_it_reads_what_edgekv_wrote() -> None:
    path = DATA / "session-2"
    found = read_session(path)
    state = read_state(path, None)
    assert state.meta is not None
    assert found.key == state.meta.key == compatibility_key(MANIFEST)
    assert found.shape == shape_of(MANIFEST)
    assert found.tokens == TOKENS[:52] == contents(path)["tokens"]
    assert (found.n_kv, len(found.pages), found.pruned) == (51, 3, [])
    assert found.steps == [40, 1, 1, 11]
    assert {kind for _, _, kind in payloads(path, found.shape)} == {0, 1, 2}


@pytest.mark.parametrize("count", seldom([17, 32, 33, 40], but=[32, 33]))
def test_what_it_writes_has_the_bytes_of_edgekv_and_goes_on_alike(count: int, tmp_path: Path) -> None:
    make(tmp_path / "theirs.kv", count)
    found = read_session(tmp_path / "theirs.kv")
    write_session(tmp_path / "mine.kv", found)
    assert payloads(tmp_path / "mine.kv", found.shape) == payloads(tmp_path / "theirs.kv", found.shape)
    mine, theirs = (read_state(tmp_path / name, None) for name in ("mine.kv", "theirs.kv"))
    assert [row.tokens for row in mine.rows] == [row.tokens for row in theirs.rows]
    assert [row.chain for row in mine.rows] == [row.chain for row in theirs.rows]
    assert replace(mine.tail, records=(), checks=()) == replace(theirs.tail, records=(), checks=())
    assert verify(tmp_path / "mine.kv") == ([], count)
    assert go_on(tmp_path / "mine.kv", 8) == go_on(tmp_path / "theirs.kv", 8)
    assert verify(tmp_path / "mine.kv")[0] == []


def test_it_writes_an_encrypted_session_and_reads_one(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    make(tmp_path / "theirs.kv", 40, SECRET)
    found = read_session(tmp_path / "theirs.kv", SECRET)
    write_session(tmp_path / "mine.kv", found, SECRET)
    assert verify(tmp_path / "mine.kv", SECRET) == ([], 40)
    assert go_on(tmp_path / "mine.kv", 4, SECRET) == go_on(tmp_path / "theirs.kv", 4, SECRET)


@pytest.mark.parametrize(
    ("pruned", "gone"), [(range(3, 9), []), (range(16, 32), [1]), (range(20, 39), []), (range(32, 39), [])]
)
def test_pruned_tokens_stay_pruned(pruned: Sequence[int], gone: list[int], tmp_path: Path) -> None:
    make(tmp_path / "theirs.kv", 40, pruned=pruned)
    found = read_session(tmp_path / "theirs.kv")
    assert found.pruned == [pruned[0], pruned[-1] + 1]
    assert [page for page, layers in enumerate(found.pages) if not layers] == gone
    write_session(tmp_path / "mine.kv", found)
    assert go_on(tmp_path / "mine.kv", 8) == go_on(tmp_path / "theirs.kv", 8)


def test_a_session_without_its_open_page_or_its_steps_goes_on_with_the_same_text(tmp_path: Path) -> None:
    make(tmp_path / "whole.kv", 40)
    found = read_session(tmp_path / "whole.kv")
    expected = go_on(tmp_path / "whole.kv", 8)[0]
    write_session(tmp_path / "tail.kv", replace(found, open_keys=None, open_values=None))
    assert go_on(tmp_path / "tail.kv", 8) == (expected, 40)  # prefill was one step, which is repeated whole
    write_session(tmp_path / "steps.kv", replace(found, steps=[]))
    assert go_on(tmp_path / "steps.kv", 8) == (expected, 8)  # without steps it begins again where a page does


def test_a_session_all_of_whose_tokens_have_keys_and_values_computes_again_for_the_logits(tmp_path: Path) -> None:
    make(tmp_path / "whole.kv", 40)
    found = read_session(tmp_path / "whole.kv")
    for count, computed in ((39, 1), (32, 16)):  # the last one is in the open page; it completed a page
        n_pages = count // 16
        one_each = [16, n_pages, *([1, count % 16] if count % 16 else [])]
        opened = (found.open_keys, found.open_values) if count % 16 else (None, None)
        mine = Session(
            found.key, found.shape, found.tokens[:count], count, one_each, [], found.pages[:n_pages], *opened
        )
        write_session(tmp_path / f"{count}.kv", mine)
        assert go_on(tmp_path / f"{count}.kv", 1)[1] == computed


def test_it_quantises_as_edgekv_does() -> None:
    from edgekv.codec import pack_warm

    rng = np.random.default_rng(0)
    for spread in (1e-6, 1.0, 300.0):
        keys, values = (rng.standard_normal((2, 16, 2, 16)) * spread).astype(np.float16)
        keys[3], values[5] = 0, 0
        out = np.zeros(2 * keys.size + 2 * 2 * 32, np.uint8)
        pack_warm(keys.astype(np.float32), values.astype(np.float32), out)
        assert SealedPage.quantise(keys, values).pack() == out.tobytes()


def test_a_folder_without_lock_ledger_and_backup_is_enough(tmp_path: Path) -> None:
    write_session(tmp_path / "mine.kv", read_session(DATA / "session-2"))
    assert sorted(path.name for path in (tmp_path / "mine.kv").iterdir()) == ["index.sqlite", "pages-00000001.bin"]
    assert go_on(tmp_path / "mine.kv", 12) == (EXPECTED["answer"][12:], 1)
    shutil.rmtree(tmp_path / "mine.kv")
