"""Every file of a session, a prefix and a bundle, in every state that a file can be in: one line or the right text."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from edgekv.errors import EdgeKVError
from edgekv.runtime.add_prefix import add_prefix
from edgekv.runtime.generate import Generator
from edgekv.runtime.options import RunOptions
from edgekv.runtime.sessions import prefixes
from edgekv.runtime.sessions.tools import compact, copy, describe, fork, verify
from edgekv.tiers import KVMode
from tests.cases import seldom
from tests.runtime.sessions.toy import Chat, open_session, some_tokens
from tests.strangers import NOBODY, without_rights

T = TypeVar("T")
BUNDLE = Path(__file__).parents[2] / "data" / "bundle-1"
TOKENS = some_tokens(43)
OTHER = some_tokens(43, 1)


def missing(path: Path, other: Path) -> None:
    path.unlink()


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def cut_in_the_middle(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def unreadable(path: Path, other: Path) -> None:
    path.chmod(0)


def read_only(path: Path, other: Path) -> None:
    path.chmod(0o400)


def from_another(path: Path, other: Path) -> None:
    if (other / path.name).exists():
        shutil.copyfile(other / path.name, path)


STATES = (missing, empty, cut_in_the_middle, a_folder, unreadable, read_only, from_another)
FILES = ("index.sqlite", "index.backup", "lock", "wear.jsonl", "pages-00000001.bin", "pages-00000002.bin")
#: What a process that is killed leaves is another index, with a log beside it.
AFTER_KILL = ("index.sqlite", "index.sqlite-wal", "index.backup")
ENDS = [*(("in order", name) for name in FILES), *(("killed", name) for name in AFTER_KILL)]


def make(path: Path, tokens: list[int], *, killed: bool) -> None:
    """Save a session in two segments; the process that saved last ended in order, or was killed."""
    session = open_session(path)
    chat = Chat(session)
    chat.start(tokens[:20])
    chat.save()
    session.close()
    fork(path, path.with_name("fork.kv"))  # shares the first segment, so that new pages go to a second one
    session = open_session(path)
    chat = Chat(session)
    chat.start(tokens)
    chat.save()
    if killed:
        shutil.copytree(path, path.with_name("killed"))
    session.close()
    if killed:
        shutil.rmtree(path)
        path.with_name("killed").rename(path)
    shutil.rmtree(path.with_name("fork.kv"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    made: dict[str, dict[str, Path]] = {}
    for end in ("in order", "killed"):
        folder = tmp_path_factory.mktemp("saved")
        for name, tokens in (("mine.kv", TOKENS), ("other.kv", OTHER)):
            make(folder / name, tokens, killed=end == "killed")
            made.setdefault(end, {})[name] = folder / name
    return made


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of a user whom permissions bind."""
    with without_rights() as folder:
        yield folder


def given(saved: dict[str, Path], place: Path) -> tuple[Path, Path]:
    """Copy the sessions; who reads them owns them."""
    root = os.geteuid()
    if os.getuid() == 0:
        os.seteuid(0)
    for name, path in saved.items():
        shutil.copytree(path, place / name)
        for copied in (place / name, *(place / name).iterdir()):
            if os.getuid() == 0:
                os.chown(copied, NOBODY, -1)
    if os.getuid() == 0:
        os.seteuid(root)
    return place / "mine.kv", place / "other.kv"


def attempt(call: Callable[[], T]) -> tuple[T | None, str]:
    """Return what a call gives, or the one line that it ends with."""
    try:
        return call(), ""
    except EdgeKVError as error:
        line = str(error)
    assert line.strip()
    assert "\n" not in line
    return None, line


def contents(path: Path) -> dict[str, bytes | None]:
    """The files that hold what was said; None: not readable as a file."""
    found: dict[str, bytes | None] = {}
    for file in path.glob("pages-*"):
        try:
            found[file.name] = file.read_bytes()
        except OSError:
            found[file.name] = None
    return found


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("end", "name"), ENDS)
def test_a_session_with_a_file_in_any_state_gives_one_error_or_the_right_bits(
    end: str, name: str, state: Callable[[Path, Path], None], saved: dict[str, dict[str, Path]], place: Path
) -> None:
    path, other = given(saved[end], place)
    state(path / name, other)
    before = contents(path)
    found, refused = attempt(lambda: verify(path))
    problems, usable = found or ([refused], -1)
    assert isinstance(describe(path), dict)
    assert contents(path) == before, "looking changes nothing"
    session, refused = attempt(lambda: open_session(path))
    if session is None:
        assert problems or name == "wear.jsonl", "verify said that it was well"
        assert contents(path) == before, "an error changes nothing"
        return
    try:
        theirs = session.tokens[:20] == OTHER[:20]
        chat = Chat(session)
        restored = chat.start(OTHER if theirs else TOKENS)
        chat.check()
        if usable >= 0:
            assert restored == usable, problems
        chat.extend([1, 2, 3])
        if session.read_only is not None:
            return
        chat.save()
    finally:
        session.close()
    assert verify(path) == ([], len(TOKENS) + 3)
    session = open_session(path)
    chat = Chat(session)
    assert chat.start((OTHER if theirs else TOKENS) + [1, 2, 3]) == len(TOKENS) + 3
    chat.check()
    session.close()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", FILES)
def test_the_tools_give_one_error_or_a_session_that_is_whole(
    name: str, state: Callable[[Path, Path], None], saved: dict[str, dict[str, Path]], place: Path
) -> None:
    for tool in (compact, fork, copy):
        for left in (*place.glob("*.kv"),):
            shutil.rmtree(left)
        path, other = given(saved["in order"], place)
        state(path / name, other)
        made = path if tool is compact else place / "made.kv"
        arguments = (path,) if tool is compact else (path, made)
        _, refused = attempt(functools.partial(tool, *arguments))
        if refused:
            assert tool is compact or not made.exists()
            continue
        problems, usable = verify(made)
        if tool is not fork:  # which shares the pages as they are
            assert problems == [] or usable == 0, (tool, problems)


# -- a prefix --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefix_tokens() -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(2, 300, 300)]


@pytest.fixture(scope="module")
def expected(prefix_tokens: list[int]) -> list[int]:
    return answer(BUNDLE, prefix_tokens, prefixes=False)


def answer(bundle: Path, tokens: list[int], **options: object) -> list[int]:
    with Generator.open(bundle, RunOptions(threads=1, kv=KVMode.INT8, **options)) as generator:  # type: ignore[arg-type]
        return list(generator.tokens(tokens, max_tokens=6))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "name",
    seldom(
        [name for name in FILES if name != "pages-00000002.bin"],
        but=["pages-00000001.bin"],
        mark=pytest.mark.exhaustive,
    ),
)
def test_a_prefix_with_a_file_in_any_state_costs_time_and_can_be_made_again(
    name: str,
    state: Callable[[Path, Path], None],
    prefix_tokens: list[int],
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
    place: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    options = RunOptions(threads=1)
    path, kept = add_prefix(BUNDLE, prefix_tokens, options)
    other, _ = add_prefix(BUNDLE, list(reversed(prefix_tokens)), options)
    state(path / name, other)
    assert answer(BUNDLE, prefix_tokens) == expected
    assert len(prefixes.list_prefixes()) == 2
    assert add_prefix(BUNDLE, prefix_tokens, options) == (path, kept)
    assert verify(path) == ([], kept)
    assert answer(BUNDLE, prefix_tokens) == expected
    prefixes.remove_prefix(path)
    assert [entry.path for entry in prefixes.list_prefixes()] == [other]


# -- a bundle --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "name",
    seldom(
        sorted(path.name for path in BUNDLE.iterdir()),
        but=["manifest.json", "weights.bin"],
        mark=pytest.mark.exhaustive,
    ),
)
def test_a_bundle_with_a_file_in_any_state_gives_one_error_or_the_right_text(
    name: str,
    state: Callable[[Path, Path], None],
    prefix_tokens: list[int],
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
    place: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    bundle = place / "model.edgekv"
    shutil.copytree(BUNDLE, bundle)
    other = place / "other"
    other.mkdir()
    data = bytearray((BUNDLE / name).read_bytes())
    data[len(data) // 2] ^= 1
    (other / name).write_bytes(data)
    assert answer(bundle, prefix_tokens) == expected  # and it was found whole
    state(bundle / name, other)
    said, refused = attempt(lambda: answer(bundle, prefix_tokens))
    if refused:
        assert state is not read_only
    else:
        assert said == expected
        assert state is read_only or name in ("chat_template.jinja", "tokenizer.json")
