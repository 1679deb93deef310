"""Whatever happens to the files of a session: it is found, what is before it is used, nothing wrong is attended to."""

from __future__ import annotations

import contextlib
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekv.errors import EdgeKVError, SessionError
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.sessions.index import BACKUP, DAMAGED, INDEX, connect
from edgekv.runtime.sessions.tools import describe, verify
from edgekv.runtime.storage.segments import segment_paths
from edgekv.tiers import KVMode
from tests.runtime.sessions.toy import PAGE_SIZE, SPEC, Chat, open_session, some_tokens
from tests.runtime.storage.dying import dying_medium

ROOT = Path(__file__).resolve().parents[3]
TOKENS = some_tokens(43)
PAGES = "pages-*.bin"
WHOLE_PAGES = 5


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session of five sealed pages and a stored open page, made by three checkpoints."""
    path = tmp_path_factory.mktemp("saved") / "chat.kv"
    session = open_session(path)
    chat = Chat(session)
    chat.start(TOKENS[:20])
    chat.save(whole=False)
    chat.extend(TOKENS[20:39])
    chat.save(whole=False)
    chat.extend(TOKENS[39:])
    chat.save()
    session.close()
    return path


def damaged(saved: Path, tmp_path: Path, change: Callable[[Path], object]) -> Path:
    copy = tmp_path / "chat.kv"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(saved, copy)
    change(copy)
    return copy


def cutting(name: str, left: int) -> Callable[[Path], object]:
    """Cut the first file of that name pattern after ``left`` bytes."""

    def cut(path: Path) -> None:
        with next(path.glob(name)).open("r+b") as file:
            file.truncate(left)

    return cut


def flipping(name: str, position: int, bit: int) -> Callable[[Path], object]:
    def flip(path: Path) -> None:
        file = next(path.glob(name))
        content = bytearray(file.read_bytes())
        content[position] ^= 1 << bit
        file.write_bytes(content)

    return flip


def resume(path: Path) -> int:
    """Run the session to its old end and a little further; returns what was restored, after checking every bit."""
    session = open_session(path)
    try:
        chat = Chat(session)
        restored = chat.start(TOKENS)
        chat.check()
        chat.extend([1, 2, 3])
        chat.save()
    finally:
        session.close()
    assert verify(path) == ([], len(TOKENS) + 3)
    session = open_session(path)
    chat = Chat(session)
    assert chat.start([*TOKENS, 1, 2, 3]) == len(TOKENS) + 3
    chat.check()
    session.close()
    return restored


def pages_file(path: Path) -> Path:
    [file] = segment_paths(path).values()
    return file


def test_an_undamaged_session_is_restored_whole(saved: Path, tmp_path: Path) -> None:
    assert verify(saved) == ([], len(TOKENS))
    assert resume(damaged(saved, tmp_path, lambda path: None)) == len(TOKENS)


def test_the_page_file_cut_at_every_record_leaves_what_is_before_usable(saved: Path, tmp_path: Path) -> None:
    records = pages_file(saved).stat().st_size // SPEC.record_bytes
    assert records >= WHOLE_PAGES * SPEC.n_layers + 2 * SPEC.n_layers
    for left in range(records):
        path = damaged(saved, tmp_path, cutting(PAGES, left * SPEC.record_bytes))
        problems, usable = verify(path)
        assert problems
        intact = min(WHOLE_PAGES, left // SPEC.n_layers)
        assert usable // PAGE_SIZE == intact
        assert resume(path) == intact * PAGE_SIZE, f"cut after {left} records"


def test_the_page_file_cut_anywhere_leaves_what_is_before_usable(saved: Path, tmp_path: Path) -> None:
    size = pages_file(saved).stat().st_size
    for left in np.random.default_rng(1).integers(0, size, 16).tolist():
        path = damaged(saved, tmp_path, cutting(PAGES, left))
        assert resume(path) <= left // (SPEC.record_bytes * SPEC.n_layers) * PAGE_SIZE


def test_a_flipped_bit_in_any_record_costs_its_page_and_what_follows(saved: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for record in range(pages_file(saved).stat().st_size // SPEC.record_bytes):
        inside = int(rng.integers(0, 64 + SPEC.warm_bytes))
        at = record * SPEC.record_bytes + inside
        path = damaged(saved, tmp_path, flipping(PAGES, at, int(rng.integers(8))))
        problems, _ = verify(path)
        assert problems, f"record {record}, byte {inside}"
        assert resume(path) == min(record // SPEC.n_layers, WHOLE_PAGES) * PAGE_SIZE


def test_records_that_changed_places_are_refused(saved: Path, tmp_path: Path) -> None:
    def swap(path: Path) -> None:
        size = SPEC.record_bytes
        content = bytearray(pages_file(path).read_bytes())
        content[:size], content[2 * size : 3 * size] = content[2 * size : 3 * size], content[:size]
        pages_file(path).write_bytes(content)

    assert resume(damaged(saved, tmp_path, swap)) == 0


def test_a_missing_page_file_is_found(saved: Path, tmp_path: Path) -> None:
    path = damaged(saved, tmp_path, lambda path: pages_file(path).unlink())
    assert verify(path)[1] == 0
    assert resume(path) == 0


def moved_away(path: Path) -> None:
    pages_file(path).rename(path.parent / "elsewhere.bin")


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("backup", [True, False])
@pytest.mark.parametrize("lose", [moved_away, cutting(PAGES, 3 * SPEC.record_bytes)])
def test_lost_pages_cost_time_and_no_token(
    lose: Callable[[Path], object], backup: bool, save: bool, saved: Path, tmp_path: Path
) -> None:
    """Also where the session is only read."""
    path = damaged(saved, tmp_path, lose)
    if not backup:
        (path / BACKUP).unlink()
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    assert any("missing in the page files" in problem for problem in describe(path)["problems"])
    session = open_session(path, save=save)
    assert session.tokens == TOKENS
    chat = Chat(session)
    assert chat.start(TOKENS) < len(TOKENS)
    assert "missing; the tokens from" in session.problems[0]
    chat.check()
    session.close()
    assert {file.name: file.read_bytes() for file in path.iterdir() if file.name != "index.sqlite-wal"} == before


def test_a_page_file_that_comes_back_is_used_again(saved: Path, tmp_path: Path) -> None:
    path = damaged(saved, tmp_path, moved_away)
    session = open_session(path)
    assert Chat(session).start(TOKENS[:20]) == 0
    session.close()
    (tmp_path / "elsewhere.bin").rename(path / "pages-00000001.bin")
    assert verify(path) == ([], len(TOKENS))
    assert resume(path) == len(TOKENS)


def test_the_place_of_a_lost_record_is_given_to_no_other(saved: Path, tmp_path: Path) -> None:
    path = damaged(saved, tmp_path, cutting(PAGES, 3 * SPEC.record_bytes))
    session = open_session(path)
    chat = Chat(session)
    chat.start(TOKENS)
    lost = {record for row in session.state.rows[1:] for record in row.records}
    chat.save()
    assert not lost & {record for row in session.state.rows for record in row.records}
    session.close()
    assert verify(path) == ([], len(TOKENS))


def test_flipped_bits_in_the_index_are_found_and_the_backup_helps(saved: Path, tmp_path: Path) -> None:
    size = (saved / INDEX).stat().st_size
    whole = 0
    for position in np.random.default_rng(3).integers(0, size, 30).tolist():
        path = damaged(saved, tmp_path, flipping(INDEX, position, position % 8))
        restored = resume(path)
        whole += restored == len(TOKENS)
        assert restored >= WHOLE_PAGES * PAGE_SIZE
    assert whole > 25, "nearly always the backup has all of it"


def test_an_index_cut_anywhere_is_replaced_by_its_backup(saved: Path, tmp_path: Path) -> None:
    size = (saved / INDEX).stat().st_size
    for left in [0, 1, 100, 512, 4096, *np.random.default_rng(4).integers(0, size, 12).tolist()]:
        path = damaged(saved, tmp_path, cutting(INDEX, left))
        assert resume(path) == len(TOKENS), left
        assert (path / DAMAGED).exists(), "what was damaged is kept"


def test_no_damaged_index_takes_the_place_of_another(saved: Path, tmp_path: Path) -> None:
    path = damaged(saved, tmp_path, cutting(INDEX, 100))
    resume(path)
    cutting(INDEX, 99)(path)
    resume(path)
    assert [(path / name).stat().st_size for name in (DAMAGED, f"{DAMAGED}.1")] == [100, 99]


OPENING = """
import sys
from pathlib import Path
from edgekv.errors import SessionError
from tests.runtime.sessions.toy import open_session
try:
    open_session(Path(sys.argv[1]))
except SessionError as error:
    print(error)
"""


def test_an_index_that_answers_eio_is_not_replaced(saved: Path, tmp_path: Path) -> None:
    path = damaged(saved, tmp_path, lambda _: None)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    environment = {**dying_medium(tmp_path, path / INDEX, f"/chat.kv/{INDEX}"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OPENING, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    assert INDEX in done.stdout
    assert "I/O error" in done.stdout
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert resume(path) == len(TOKENS)


def test_without_a_backup_a_damaged_index_gives_what_is_whole_or_a_clear_error(saved: Path, tmp_path: Path) -> None:
    size = (saved / INDEX).stat().st_size
    outcomes, refused = {"restored": 0}, []
    for position in np.random.default_rng(5).integers(0, size, 30).tolist():

        def spoil(path: Path, position: int = position) -> None:
            (path / BACKUP).unlink()
            flipping(INDEX, position, position % 8)(path)

        path = damaged(saved, tmp_path, spoil)
        before = {file.name for file in path.iterdir()}
        try:
            resume(path)
            outcomes["restored"] += 1
        except SessionError as error:
            refused.append(str(error))
            assert {file.name for file in path.iterdir()} >= before
    assert outcomes["restored"] > 22
    assert all("nothing was deleted" in message for message in refused)


def test_an_index_that_is_gone_is_replaced_by_its_backup(saved: Path, tmp_path: Path) -> None:
    assert resume(damaged(saved, tmp_path, lambda path: (path / INDEX).unlink())) == len(TOKENS)


def test_an_older_index_never_gets_newer_records(tmp_path: Path) -> None:
    """The places of a forgotten history are used again; the index from before must not believe what is there now."""
    path = tmp_path / "chat.kv"
    session = open_session(path)
    chat = Chat(session)
    chat.start(TOKENS[:40])
    chat.save()
    session.close()
    old = (path / INDEX).read_bytes()
    session = open_session(path)
    chat = Chat(session)
    assert chat.start([*TOKENS[:8], *some_tokens(32, seed=9)]) == 8
    chat.save()
    chat.cut(8)
    chat.extend(some_tokens(32, seed=10))
    chat.save()
    session.close()
    (path / INDEX).write_bytes(old)
    session = open_session(path)
    chat = Chat(session)
    assert session.tokens == TOKENS[:40]
    assert chat.start(TOKENS[:40]) < 40
    chat.check()
    session.close()


def test_a_write_ahead_log_damaged_anywhere_gives_an_earlier_commit(tmp_path: Path) -> None:
    source = tmp_path / "source.kv"
    session = open_session(source)
    chat = Chat(session)
    for end in range(10, 43, 10):
        chat.start(TOKENS[:end]) if not chat.tokens else chat.extend(TOKENS[len(chat.tokens) : end])
        chat.save(whole=False)
    running = tmp_path / "running.kv"  # what a killed process leaves: the log is not folded into the index
    shutil.copytree(source, running)
    session.close()
    log = f"{INDEX}-wal"
    size = (running / log).stat().st_size
    rng = np.random.default_rng(6)
    for position in rng.integers(0, size, 15).tolist():
        for cut in (True, False):
            spoil = cutting(log, position) if cut else flipping(log, position, position % 8)
            path = damaged(running, tmp_path, spoil)
            with contextlib.suppress(EdgeKVError):
                resume(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_pages_that_come_into_a_window_again_behind_a_damaged_one_are_checked_too(
    share: float, checkpoint: Callable[[str], Path], bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder, prompt = bundle(checkpoint("mistral-window")), [7 * number % 250 for number in range(400)]

    def answer(tokens: list[int], session: SessionOptions | None) -> tuple[list[int], list[str]]:
        options = RunOptions(threads=2, kv=KVMode.INT8, context=700, prefixes=False, session=session)
        with Generator.open(folder, options) as generator:
            said = list(generator.tokens(tokens, max_tokens=30))
            return said, list(generator.session.problems) if generator.session else []

    said, _ = answer(prompt, SessionOptions(tmp_path / "chat.kv"))
    more = [*prompt, *said, 5]
    expected, _ = answer(more, None)
    file = next((tmp_path / "chat.kv").glob(PAGES))
    content = file.read_bytes()
    kept = int(len(content) * share)
    file.write_bytes(content[:kept] + bytes(len(content) - kept))
    again, problems = answer(more, SessionOptions(tmp_path / "chat.kv"))
    assert again == expected
    assert len(problems) == 1
    assert re.fullmatch(
        r"(page \d+|the open page) is damaged or missing; the tokens from \d+ on are computed again", problems[0]
    )


def test_a_table_whose_name_is_no_text_is_damage_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE pages(number)")
        db.commit()
    path.write_bytes(path.read_bytes().replace(b"tablepages", b"tablep\xa7ges").replace(b"pages(", b"p\xa7ges("))
    with pytest.raises(sqlite3.DatabaseError, match="damaged, in what its tables are called"):
        connect(path)
