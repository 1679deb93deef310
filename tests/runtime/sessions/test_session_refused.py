"""What the system refuses, or the user asked wrongly: nothing is replaced, nothing is left behind, one line says what it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekv.cli.main import run_command_line
from edgekv.errors import SessionError, StoreError, UsageError
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.sessions.index import BACKUP, INDEX
from edgekv.runtime.sessions.session import Session
from edgekv.runtime.sessions.tools import contents as tokens_of
from edgekv.runtime.sessions.tools import describe
from edgekv.runtime.storage.cipher import find_secret
from edgekv.runtime.storage.segments import segment_paths
from tests.runtime.sessions.toy import MANIFEST, Chat, open_session, some_tokens
from tests.strangers import without_rights

BUNDLE = str(Path(__file__).parents[2] / "data" / "bundle-1")
TOKENS = some_tokens(43)
Output = pytest.CaptureFixture[str]


def saved(path: Path) -> Path:
    session = open_session(path)
    chat = Chat(session)
    chat.start(TOKENS)
    chat.save()
    session.close()
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def run(*arguments: str | int | Path) -> int:
    return run_command_line(["run", BUNDLE, "-q", *map(str, arguments)])


def edgekv(*arguments: str | Path) -> int:
    return run_command_line([*map(str, arguments)])


@pytest.mark.parametrize("lose", [lambda file: os.truncate(file, file.stat().st_size // 3), Path.unlink])
def test_a_continued_session_goes_on_from_its_end_when_its_pages_are_lost(
    lose: Callable[[Path], None], tmp_path: Path, capfd: Output
) -> None:
    whole, cut = tmp_path / "whole.kv", tmp_path / "cut.kv"
    for path in (whole, cut):
        assert run("-p", "It was a dark night. " * 12, "-n", 8, "--session", path) == 0
    for file in segment_paths(cut).values():
        lose(file)
    capfd.readouterr()
    assert run("-n", 8, "--continue", "--session", whole) == 0
    expected = capfd.readouterr()
    assert run("-n", 8, "--continue", "--session", cut) == 0
    said = capfd.readouterr()
    assert said.out == expected.out
    assert expected.err == ""
    assert said.err.startswith(f"edgekv: {cut}: ")
    assert said.err.endswith("computed again\n")
    assert said.err.count("\n") == 1
    assert tokens_of(cut)["tokens"] == tokens_of(whole)["tokens"]


def test_continuing_a_session_that_is_not_there_leaves_nothing_behind(tmp_path: Path, capfd: Output) -> None:
    assert run("--continue", "--session", tmp_path / "nothere.kv") == 2
    assert "is empty: give it a --prompt first" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_session_that_is_not_saved_says_so_where_it_is_quiet(capfd: Output) -> None:
    with without_rights() as folder:
        path = folder / "chat.kv"
        assert run("-p", "It was", "-n", 2, "--session", path) == 0
        path.chmod(0o500)
        before = contents(path)
        capfd.readouterr()
        assert run("-n", 2, "--continue", "--session", path) == 0
        said = capfd.readouterr()
        assert said.out.strip()
        assert said.err == f"edgekv: {path} is not saved: its files cannot be written\n"
        assert contents(path) == before


def test_an_unreadable_session_hides_no_other(capfd: Output) -> None:
    with without_rights() as folder:
        saved(folder / "good.kv")
        saved(folder / "bad.kv").chmod(0)
        assert edgekv("sessions", "list", folder) == 1
        said = capfd.readouterr()
        assert "good.kv" in said.out
        assert said.err == f"edgekv: cannot read the session {folder / 'bad.kv'}: Permission denied\n"
        (folder / "bad.kv").chmod(0o700)


@pytest.mark.parametrize("name", [INDEX, BACKUP])
def test_what_cannot_be_read_is_not_replaced(name: str) -> None:
    with without_rights() as folder:
        path = saved(folder / "chat.kv")
        if name == BACKUP:
            (path / INDEX).write_bytes(b"damaged")
        before = contents(path)
        (path / name).chmod(0)
        with pytest.raises(StoreError, match=f"cannot open the index .*{name}: Permission denied"):
            open_session(path)
        (path / name).chmod(0o600)
        assert contents(path) == before


def test_an_index_that_is_a_pipe_is_called_what_it_is(tmp_path: Path) -> None:
    path = saved(tmp_path / "chat.kv")
    (path / INDEX).unlink()
    (path / BACKUP).unlink()
    os.mkfifo(path / INDEX)
    assert describe(path)["problems"] == [f"cannot open the index {path / INDEX}: {INDEX}: it is not a file"]
    with pytest.raises(SessionError, match="it is not a file"):
        open_session(path)


def test_a_session_beyond_the_writes_of_a_day_is_not_told_to_drop_pages(tmp_path: Path) -> None:
    session = Session.open(SessionOptions(tmp_path / "chat.kv", max_bytes_per_day=1), MANIFEST)
    chat = Chat(session)
    chat.start(TOKENS)
    with pytest.raises(StoreError, match="raise that limit, or run without --session"):
        chat.save()
    session.close()


@pytest.mark.parametrize("secret", [b"", b"short", "a secret of more than sixteen bytes"])
def test_a_secret_that_is_none_is_refused_before_anything_is_written(secret: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="secret"):
        SessionOptions(tmp_path / "chat.kv", secret=secret)
    assert not any(tmp_path.iterdir())


def test_a_key_file_without_an_end_is_refused() -> None:
    with pytest.raises(UsageError, match="larger than 64 KiB"):
        find_secret(Path("/dev/zero"))
