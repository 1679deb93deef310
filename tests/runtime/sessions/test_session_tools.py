"""Fork, compact, copy, remove and encrypt."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edgekv.cli.main import app
from edgekv.errors import CorruptPage, SessionError, SessionMismatch, StoreError, StoreLocked, UsageError
from edgekv.runtime.options import RunOptions
from edgekv.runtime.sessions import tools as tools
from edgekv.runtime.storage.cipher import KEY_VARIABLE, Cipher, find_secret
from edgekv.runtime.storage.flash import FlashStore
from edgekv.runtime.storage.open import open_offload
from edgekv.runtime.storage.segments import segment_paths
from edgekv.runtime.system.buffers import aligned_rows
from tests.runtime.sessions.toy import SPEC, Chat, open_session, some_tokens

SECRET = b"a secret of more than sixteen bytes"


def make(path: Path, tokens: list[int], secret: bytes | None = None) -> None:
    session = open_session(path, secret)
    chat = Chat(session)
    chat.start(tokens)
    chat.save()
    session.close()


def resumed(path: Path, tokens: list[int], secret: bytes | None = None) -> int:
    session = open_session(path, secret)
    chat = Chat(session)
    count = chat.start(tokens)
    chat.check()
    chat.save()
    session.close()
    assert tools.verify(path, secret) == ([], len(tokens))
    return count


def flash_bytes(*paths: Path) -> int:
    """What the page files of sessions take, shared ones counted once."""
    files = {file.stat().st_ino: file.stat().st_size for path in paths for file in segment_paths(path).values()}
    return sum(files.values())


def test_a_fork_shares_its_pages_and_the_two_never_disturb_each_other(tmp_path: Path) -> None:
    tokens, first, second = some_tokens(40), tmp_path / "a.kv", tmp_path / "b.kv"
    make(first, tokens)
    size = flash_bytes(first)
    tools.fork(first, second)
    assert flash_bytes(first, second) == size, "nothing was copied"
    left, right = tokens[:24] + some_tokens(30, 1), tokens + some_tokens(30, 2)
    for _ in range(2):  # both write and forget, in turns
        assert resumed(first, left) >= 24
        assert resumed(second, right) >= 40
    tools.remove(first)
    assert resumed(second, right) == len(right)


@pytest.mark.parametrize("same", [True, False], ids=["one file system", "two"])
def test_a_fork_says_whether_the_pages_were_shared_or_copied(
    same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, first, second = some_tokens(40), tmp_path / "a.kv", tmp_path / "b.kv"
    make(first, tokens)
    size = flash_bytes(first)

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    if not same:
        monkeypatch.setattr(os, "link", refuse)
    result = CliRunner().invoke(app, ["sessions", "fork", str(first), str(second)])
    did = "shares" if same else "holds a copy of"
    assert result.output.replace("\n", " ").strip() == f"{second} begins as {first} and {did} its pages"
    assert flash_bytes(first, second) == (size if same else 2 * size)
    assert resumed(second, tokens) == 40


def test_a_fork_while_the_session_is_open_is_the_last_checkpoint(tmp_path: Path) -> None:
    session = open_session(tmp_path / "a.kv")
    chat = Chat(session)
    chat.start(some_tokens(24))
    chat.save()
    chat.extend(some_tokens(9, 1))
    session.fork(tmp_path / "b.kv")
    chat.extend(some_tokens(20, 2))
    chat.save()
    session.close()
    assert resumed(tmp_path / "b.kv", some_tokens(24)) == 24
    assert resumed(tmp_path / "a.kv", chat.tokens) == 53


def test_removing_gives_the_space_back_unless_a_fork_needs_it(tmp_path: Path) -> None:
    first, second = tmp_path / "a.kv", tmp_path / "b.kv"
    make(first, some_tokens(40))
    tools.fork(first, second)
    own = tools.remove(first)
    assert not first.exists()
    assert list(tmp_path.iterdir()) == [second]
    assert own < 10 * SPEC.record_bytes <= tools.remove(second)
    assert list(tmp_path.iterdir()) == []


def test_compacting_gives_back_what_a_changed_history_left(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    make(path, some_tokens(80))
    assert resumed(path, some_tokens(80)[:16] + some_tokens(10, 1)) == 16
    before, after = tools.compact(path)
    assert before > after > 0
    assert list(segment_paths(path)) == [2]
    assert resumed(path, some_tokens(80)[:16] + some_tokens(10, 1)) == 26


def test_a_damaged_session_is_not_compacted(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    make(path, some_tokens(40))
    [file] = segment_paths(path).values()
    content = bytearray(file.read_bytes())
    content[3 * SPEC.record_bytes + 100] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptPage):
        tools.compact(path)
    assert file.read_bytes() == content
    problems, usable = tools.verify(path)
    assert problems == ["page 1: layer 1 damaged or missing"]
    assert usable == 8


def test_an_export_is_independent_and_compact(tmp_path: Path) -> None:
    first, second = tmp_path / "a.kv", tmp_path / "b.kv"
    make(first, some_tokens(60))
    resumed(first, some_tokens(20))
    tools.copy(first, second)
    assert {file.stat().st_nlink for file in segment_paths(second).values()} == {1}
    tools.remove(first)
    assert resumed(second, some_tokens(20)) == 20
    assert tools.contents(second)["tokens"] == some_tokens(20)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_FSIZE as a full disk")
def test_a_copy_that_does_not_fit_names_its_destination_and_leaves_nothing(tmp_path: Path) -> None:
    make(tmp_path / "a.kv", some_tokens(60))
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from edgekv.errors import StoreFull; from edgekv.runtime.sessions import tools\n"
        "first, second = map(Path, sys.argv[1:])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "largest = max(file.stat().st_size for file in first.glob('pages-*'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, resource.RLIM_INFINITY))\n"
        "try: tools.copy(first, second)\n"
        "except StoreFull as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.kv"), str(tmp_path / "copies" / "b.kv")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(f"{tmp_path / 'copies'} is full, nothing was copied"), result.stdout
    assert list((tmp_path / "copies").iterdir()) == []
    assert tools.verify(tmp_path / "a.kv") == ([], 60)


def test_a_lock_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    make(tmp_path / "a.kv", some_tokens(20))
    (tmp_path / "a.kv" / "lock").unlink()
    (tmp_path / "a.kv" / "lock").mkdir()
    with pytest.raises(SessionError, match=r"cannot open the session .*a.kv: lock: "):
        open_session(tmp_path / "a.kv")
    (tmp_path / "flash" / "lock").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"cannot write the offload folder .*flash/lock: "):
        FlashStore(tmp_path / "flash", SPEC)


def test_tools_leave_what_is_no_session_and_what_is_open_alone(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for tool in (tools.remove, tools.verify, tools.describe, tools.compact):
        with pytest.raises(UsageError, match="not a session"):
            tool(tmp_path / "folder")
    session = open_session(tmp_path / "a.kv")
    for tool in (tools.remove, tools.verify, tools.compact):
        with pytest.raises(StoreLocked):
            tool(tmp_path / "a.kv")
    assert tools.describe(tmp_path / "a.kv")["tokens"] == 0
    chat = Chat(session)
    chat.start(some_tokens(3))
    chat.save()
    session.close()
    with pytest.raises(UsageError, match="exists already"):
        tools.fork(tmp_path / "a.kv", tmp_path / "folder")


def test_an_encrypted_session_resumes_with_its_key_only(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    path, tokens = tmp_path / "a.kv", some_tokens(45)
    make(path, tokens, SECRET)
    assert resumed(path, tokens, SECRET) == 45
    for secret, reason in ((None, "is encrypted; run with --encrypt"), (SECRET + b"!", "not the key of the session")):
        with pytest.raises(SessionMismatch, match=reason):
            open_session(path, secret)
    make(tmp_path / "plain.kv", tokens)
    with pytest.raises(SessionMismatch, match="is not encrypted"):
        open_session(tmp_path / "plain.kv", SECRET)
    tools.fork(path, tmp_path / "b.kv", SECRET)
    tools.compact(tmp_path / "b.kv", SECRET)
    assert resumed(tmp_path / "b.kv", tokens, SECRET) == 45


def test_no_file_of_an_encrypted_session_shows_tokens_keys_or_values(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    tokens = some_tokens(45)
    make(tmp_path / "plain.kv", tokens)
    make(tmp_path / "secret.kv", tokens, SECRET)
    [plain] = segment_paths(tmp_path / "plain.kv").values()
    needles = [np.asarray(tokens[:8], "<i4").tobytes(), plain.read_bytes()[64:164], plain.read_bytes()[-2000:-1900]]
    needles.append(", ".join(map(str, tokens[40:])).encode())

    def found(folder: Path) -> list[bool]:
        content = b"".join(file.read_bytes() for file in folder.iterdir())
        return [needle in content for needle in needles if any(needle)]

    assert all(found(tmp_path / "plain.kv"))
    assert not any(found(tmp_path / "secret.kv"))


def test_a_changed_encrypted_record_is_refused_even_with_a_right_checksum(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    cipher = Cipher(SECRET, bytes(16))
    encrypted = cipher.encrypt(b"keys and values", b"here")
    assert cipher.decrypt(encrypted, b"here") == b"keys and values"
    assert cipher.decrypt(encrypted, b"there") is None
    assert cipher.decrypt(encrypted[:-1] + bytes([encrypted[-1] ^ 1]), b"here") is None
    assert Cipher.ephemeral().decrypt(encrypted, b"here") is None


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_bytes(SECRET + b"\n")
    assert find_secret(tmp_path / "key") == SECRET
    monkeypatch.setenv(KEY_VARIABLE, "0123456789abcdef")
    assert find_secret() == b"0123456789abcdef"
    monkeypatch.setenv(KEY_VARIABLE, "short")
    with pytest.raises(UsageError, match="shorter than 16 bytes; make one with: openssl rand"):
        find_secret()
    with pytest.raises(UsageError, match="cannot read the key file"):
        find_secret(tmp_path / "none")
    monkeypatch.delenv(KEY_VARIABLE)
    assert os.environ.get(KEY_VARIABLE) is None


def test_offloaded_pages_of_a_run_are_unreadable_without_the_key_of_its_process(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    store = open_offload(RunOptions(offload=tmp_path, encrypt_offload=True).storage, SPEC)
    pages = list(np.random.default_rng(0).integers(0, 256, (3, SPEC.warm_bytes), np.uint8))
    records = store.write([0, 1, 2], pages)
    out = aligned_rows(3, SPEC.record_bytes)
    store.read(records, [0, 1, 2], out)
    np.testing.assert_array_equal(out[:, 64 : 64 + SPEC.warm_bytes], pages)
    assert isinstance(store, FlashStore)
    on_flash = os.pread(store.file.handle, 3 * SPEC.record_bytes, 0)
    assert not any(page.tobytes()[:64] in on_flash for page in pages)
    store.close()
    assert sorted(left.name for left in tmp_path.iterdir()) == ["lock", "wear.jsonl"]
