"""Links and strangers' files: never written through, never believed, never loaded; and who is refused hears why."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekv.bundle import check_files, read_manifest
from edgekv.errors import BundleError, EdgeKVError, StoreError
from edgekv.files import create_file, make_folder, make_own_folder, open_file, read_own, replace_own
from edgekv.runtime.add_prefix import add_prefix
from edgekv.runtime.generate import Generator
from edgekv.runtime.options import RunOptions, SessionOptions
from edgekv.runtime.sessions.prefixes import find_prefix, prefix_root
from edgekv.runtime.storage.flash import FlashStore
from edgekv.runtime.storage.wear import WearLedger
from edgekv.spec import PageSpec
from tests.runtime.sessions.toy import Chat, open_session, some_tokens
from tests.strangers import NOBODY, needs_root, without_rights

BUNDLE = Path(__file__).parent / "data" / "bundle-1"
SPEC = PageSpec(2, 2, 32, 16)


def linked(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def hard_linked(path: Path, victim: Path) -> None:
    os.link(victim, path)


def strangers(path: Path, victim: Path) -> None:
    path.write_bytes(b"")
    path.chmod(0o666)
    os.chown(path, NOBODY, NOBODY)


def a_folder(path: Path, victim: Path) -> None:
    path.mkdir()


def a_pipe(path: Path, victim: Path) -> None:
    os.mkfifo(path)


PLANTED = [
    (linked, "it is a link"),
    (hard_linked, "it has another name elsewhere"),
    pytest.param(strangers, "it belongs to another user", marks=needs_root),
    (a_folder, "Is a directory"),
    (a_pipe, "it is not a file"),
]
planted = pytest.mark.parametrize(("plant", "why"), PLANTED)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgekv"


@planted
@pytest.mark.parametrize("name", ["lock", "wear.jsonl"])
def test_what_stands_in_the_way_of_an_offload_folder_is_refused(
    name: str, plant: Callable[[Path, Path], None], why: str, tmp_path: Path, victim: Path
) -> None:
    folder = tmp_path / "flash"
    folder.mkdir()
    plant(folder / name, victim)
    with pytest.raises(StoreError, match=why):
        FlashStore(folder, SPEC, wear=WearLedger(folder))
    assert victim.read_text() == "precious"


def test_a_page_file_is_made_under_a_name_that_nobody_knows_before(tmp_path: Path) -> None:
    """The name was once that of the process: a link under it was followed, and what it led to emptied."""
    store = FlashStore(tmp_path, SPEC)
    store.write([0], [np.ones(SPEC.warm_bytes, np.uint8)])
    status = os.fstat(store.file.handle)
    assert (status.st_nlink, stat.S_IMODE(status.st_mode)) == (0, 0o600)
    store.close()


@pytest.fixture
def session_folder(tmp_path: Path) -> Path:
    """A session of two pages and a half, closed."""
    folder = tmp_path / "chat.kv"
    session = open_session(folder)
    chat = Chat(session)
    chat.start(some_tokens(20))
    chat.save()
    session.close()
    return folder


@planted
@pytest.mark.parametrize("name", ["lock", "wear.jsonl", "pages-00000002.bin"])
def test_what_stands_in_the_way_of_a_session_is_refused(
    name: str, plant: Callable[[Path, Path], None], why: str, session_folder: Path, victim: Path
) -> None:
    (session_folder / name).unlink(missing_ok=True)
    plant(session_folder / name, victim)
    if name.startswith("pages") and plant is hard_linked:
        open_session(session_folder).close()  # sessions share page files so, and then only read them
    else:
        with pytest.raises(StoreError, match=why):
            open_session(session_folder)
    assert victim.read_text() == "precious"


@planted
@pytest.mark.parametrize("name", ["index.sqlite", "index.sqlite-wal", "index.sqlite-journal"])
def test_an_index_that_is_not_ours_is_set_aside_for_the_backup(
    name: str, plant: Callable[[Path, Path], None], why: str, session_folder: Path, victim: Path
) -> None:
    (session_folder / name).unlink(missing_ok=True)
    plant(session_folder / name, victim)
    theirs = (session_folder / name).stat().st_ino
    try:
        session = open_session(session_folder)
    except StoreError as error:  # beside the index, and nothing can be known of what it would change
        refused = str(error)
        session = None
    assert victim.read_text() == "precious"
    if session is None:
        assert why in refused
        return
    chat = Chat(session)
    assert chat.start(some_tokens(20)) == 20
    chat.check()
    chat.extend([1, 2, 3])
    chat.save()
    session.close()
    assert victim.read_text() == "precious"
    assert not any(path.stat().st_ino == theirs for path in session_folder.glob("index.sqlite*"))


def test_a_backup_does_not_go_through_a_link(tmp_path: Path, victim: Path) -> None:
    folder = tmp_path / "chat.kv"
    folder.mkdir()
    (folder / "index.backup.tmp").symlink_to(victim)
    session = open_session(folder)
    chat = Chat(session)
    chat.start(some_tokens(20))
    chat.save()
    session.close()
    assert victim.read_text() == "precious"
    assert (folder / "index.backup").is_file()


def test_new_folders_and_files_are_for_their_owner_only(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        make_folder(tmp_path / "a" / "b")
        os.close(create_file(tmp_path / "a" / "file"))
        os.close(open_file(tmp_path / "a" / "other", os.O_RDWR | os.O_CREAT))
        replace_own(tmp_path / "a" / "third", b"content")
    finally:
        os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a", *(tmp_path / "a").iterdir())}
    assert modes == {"a": 0o700, "b": 0o700, "file": 0o600, "other": 0o600, "third": 0o600}


def test_what_is_believed_could_be_written_by_nobody_else(tmp_path: Path, victim: Path) -> None:
    path = tmp_path / "note"
    replace_own(path, b"mine")
    assert read_own(path) == b"mine"
    path.chmod(0o620)
    with pytest.raises(OSError, match="others may write it"):
        read_own(path)
    replace_own(path, b"mine again")
    assert read_own(path) == b"mine again"
    path.unlink()
    path.symlink_to(victim)
    with pytest.raises(OSError, match="it is a link"):
        read_own(path)
    replace_own(path, b"mine")
    assert victim.read_text() == "precious"


def test_a_folder_of_ours_that_others_may_write_is_closed_to_them(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    make_own_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@needs_root
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY, NOBODY)
    with pytest.raises(OSError, match="it belongs to another user"):
        make_own_folder(tmp_path)


@pytest.mark.parametrize("change", ["a link", "writable", pytest.param("a stranger's", marks=needs_root)])
def test_a_stamp_that_others_could_have_made_does_not_save_the_hashing(
    change: str, tmp_path: Path, victim: Path
) -> None:
    bundle = tmp_path / "model.edgekv"
    shutil.copytree(BUNDLE, bundle)
    stamp = tmp_path / "cache" / "stamp.json"
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, stamp=stamp)
    weights = bundle / "weights.bin"
    status = weights.stat()
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    check_files(bundle, manifest, stamp=stamp)  # the stamp is believed: it is ours
    if change == "a link":
        stamp.rename(tmp_path / "stamp.json")
        stamp.symlink_to(tmp_path / "stamp.json")
    elif change == "writable":
        stamp.chmod(0o666)
    else:
        os.chown(stamp, NOBODY, NOBODY)
    with pytest.raises(EdgeKVError, match=r"weights.bin differs from its sha256"):
        check_files(bundle, manifest, stamp=stamp)


def test_a_file_of_a_bundle_that_may_not_be_read_is_named() -> None:
    with without_rights() as folder:
        bundle = folder / "model.edgekv"
        shutil.copytree(BUNDLE, bundle)
        manifest = read_manifest(bundle)
        (bundle / "weights.bin").chmod(0)
        with pytest.raises(BundleError, match=r"weights.bin cannot be read \(Permission denied\)"):
            check_files(bundle, manifest)


def test_prefixes_in_a_folder_that_others_may_write_are_not_used() -> None:
    tokens = [int(token) for token in np.random.default_rng(0).integers(2, 300, 40)]
    add_prefix(BUNDLE, tokens, RunOptions(threads=1, prefill_chunk=16))
    manifest = read_manifest(BUNDLE)
    with Generator.open(BUNDLE, RunOptions(threads=1)) as generator:
        by = generator.computed_by
    assert find_prefix(manifest, tokens, 16, by) is not None
    prefix_root().chmod(0o777)
    assert find_prefix(manifest, tokens, 16, by) is None


def test_a_session_of_somebody_else_is_read_and_not_written(tmp_path: Path) -> None:
    tokens = some_tokens(30)
    with without_rights() as folder:
        theirs = folder / "chat.kv"
        session = open_session(theirs)
        chat = Chat(session)
        chat.start(tokens)
        chat.save()
        session.close()
        theirs.chmod(0o500)
        (theirs / "lock").chmod(0o400)
        before = {path.name: path.read_bytes() for path in theirs.iterdir()}
        session = open_session(theirs)
        assert session.read_only == "its files cannot be written"
        chat = Chat(session)
        assert chat.start(tokens) == len(tokens)
        session.close()
        assert {path.name: path.read_bytes() for path in theirs.iterdir()} == before


# -- code ------------------------------------------------------------------------------------------------------------


class Shim:
    """The compiled shim in the cache folder, made once by compiling it."""

    def __init__(self, cache: Path) -> None:
        from edgekv.runtime.engines.executorch import build

        self.cache = cache
        self._built = build.built_shim
        self._package = build.package_folder()
        with self._built(self._package, cache) as path:
            self.path = path

    def ask(self) -> Path:
        with self._built(self._package, self.cache) as path:
            assert path.is_file()
            assert not path.is_symlink()
            assert path.stat().st_uid == os.geteuid()
            return path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, put_shim: Callable[[Path], None]) -> Shim:
    pytest.importorskip("executorch", reason="the extra `executorch` is not installed")
    cache = tmp_path_factory.mktemp("compiled")
    put_shim(cache)
    return Shim(cache)


@pytest.fixture
def shim(compiled: Shim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shim:
    """A cache of its own; the compiler, which takes seconds, is a copy of what it made once."""
    from edgekv.runtime.engines.executorch import build

    made = compiled.path.read_bytes()

    def compile_again(compiler: str, package: Path, folder: Path) -> Path:
        (folder / "shim.so").write_bytes(made)
        return folder / "shim.so"

    monkeypatch.setattr(build, "_compile", compile_again)
    return Shim(tmp_path / "cache")


@pytest.mark.parametrize("change", ["a link", "writable", pytest.param("a stranger's", marks=needs_root)])
def test_code_in_the_cache_that_others_could_have_written_is_compiled_again(
    change: str, shim: Shim, tmp_path: Path
) -> None:
    path = shim.path
    assert shim.ask() == path
    planted = tmp_path / "planted.so"
    planted.write_bytes(b"not to be loaded")
    path.unlink()
    if change == "a link":
        path.symlink_to(planted)
    else:
        path.write_bytes(planted.read_bytes())
        path.chmod(0o777)
        if change == "a stranger's":
            os.chown(path, NOBODY, NOBODY)
            path.chmod(0o600)
    assert shim.ask() == path
    assert path.read_bytes() != planted.read_bytes() == b"not to be loaded"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@needs_root
def test_code_in_a_folder_of_somebody_else_is_compiled_for_this_process_alone(shim: Shim) -> None:
    os.chown(shim.path.parent, NOBODY, NOBODY)
    path = shim.ask()
    assert path.parent != shim.path.parent
    assert not path.exists(), "it was for that block"


def test_a_cache_folder_that_is_a_file_costs_time_and_nothing_else(tmp_path: Path, own_cache: Path) -> None:
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text("not a folder")
    tokens = [int(token) for token in np.random.default_rng(0).integers(2, 300, 40)]
    options = RunOptions(threads=1, session=SessionOptions(tmp_path / "chat.kv"))
    with Generator.open(BUNDLE, options) as generator:
        assert len(list(generator.tokens(tokens, max_tokens=3))) == 3
    with pytest.raises(StoreError, match=r"cannot write the prefixes .* let \$XDG_CACHE_HOME name a folder"):
        add_prefix(BUNDLE, tokens, RunOptions(threads=1))
    options = RunOptions(threads=1, kv_budget=80000, context=500)
    with (
        Generator.open(BUNDLE, options) as generator,
        pytest.raises(StoreError, match="choose another with --offload DIR"),
    ):
        list(generator.tokens(tokens, max_tokens=3))
