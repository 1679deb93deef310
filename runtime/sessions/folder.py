"""The folder of a session: its lock, its index with the backup, and what to do when the index is damaged."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from edgekv.bundle import Manifest
from edgekv.codec import CODEC_VERSION
from edgekv.errors import SessionError, SessionMismatch, StoreLocked, UsageError
from edgekv.files import create_file, make_folder, open_file, reason
from edgekv.schema import printable
from edgekv.scratch import ScratchFolder
from edgekv.spec import PageSpec

from ..storage.cipher import SALT_BYTES, Cipher
from ..storage.segments import count_records, is_counted, segment_paths, sync_folder
from ..storage.wear import LEDGER, WearLedger
from .index import BACKUP, DAMAGED, FORMAT, INDEX, Meta, SessionIndex, State, UnreadableIndex, cannot_open

if sys.platform != "win32":
    import fcntl

LOCK = "lock"
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def is_session(path: Path) -> bool:
    """Say whether a folder looks like a session."""
    return path.is_dir() and ((path / INDEX).exists() or (path / BACKUP).exists())


def make_session(path: Path) -> bool:
    """Make the folder of a new session, readable by its owner only; an existing session is left as it is.

    Returns:
        whether it was made now.

    Raises:
        UsageError: something else is there. SessionError: it cannot be made.
    """
    if is_session(path):
        return False
    try:
        if path.exists():
            # A session whose first commit never came may hold any of its files.
            if not path.is_dir() or any(
                not p.name.startswith((LOCK, "index.", "pages-", LEDGER)) for p in path.iterdir()
            ):
                raise UsageError(f"{path} exists and is not a session; choose another name for --session")
            return False
        make_folder(path)
        sync_folder(path.parent)
        return True
    except OSError as error:
        raise SessionError(f"cannot make the session {path}: {error.strerror}; choose another place") from error


def unmake_session(path: Path) -> None:
    """Remove the folder that :func:`make_session` made, where nothing was saved: no checkpoint names a page that is in it."""
    with contextlib.suppress(OSError):
        for file in path.iterdir():
            if file.name.startswith((LOCK, "index.", "pages-", LEDGER)):
                file.unlink()
        path.rmdir()


def take_lock(path: Path) -> int | None:
    """Keep other processes out of a session; returns the handle, or None where it can only be read.

    Raises:
        StoreLocked: another process has it open. SessionError: it cannot be used, or is another user's.
    """
    if not _may_write(path):
        return None
    try:
        handle = open_file(path / LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        if error.errno in _READ_ONLY:
            return None
        raise SessionError(f"cannot open the session {path}: {LOCK}: {reason(error)}") from error
    if sys.platform != "win32":
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise StoreLocked(
                f"the session {path} is open already, here or in another process; wait until it ends, or name another session"
            ) from error
    return handle


def _may_write(path: Path) -> bool:
    """Say whether a session can be written: its folder, in which SQLite makes files, and its index if that can be read."""

    def may(file: Path, mode: int) -> bool:
        return os.access(file, mode, effective_ids=os.access in os.supports_effective_ids)

    index = path / INDEX, path / f"{INDEX}-wal"
    return may(path, os.W_OK) and all(may(file, os.W_OK) or not may(file, os.R_OK) for file in index)


@contextmanager
def index_copy(path: Path, name: str = INDEX) -> Iterator[SessionIndex]:
    """Open a private copy of an index: nothing is written beside the session, and nobody is disturbed.

    Raises:
        UnreadableIndex, SessionError: it cannot be read.
    """
    with ScratchFolder(None, "edgekv-") as scratch:
        folder = scratch.path
        try:
            for suffix in ("", "-wal") if (path / f"{name}-wal").exists() else ("",):
                with os.fdopen(open_file(path / f"{name}{suffix}", os.O_RDONLY), "rb") as source:
                    (folder / f"{INDEX}{suffix}").write_bytes(source.read())
        except OSError as error:
            raise cannot_open(path / name, error) from error
        index = SessionIndex(folder / INDEX)
        try:
            yield index
        finally:
            index.close()


def load_index(index: SessionIndex, path: Path, secret: bytes | None) -> State:
    """Read everything that is whole in an index. Whether its records are in the page files is another question.

    Raises:
        SessionMismatch: it is encrypted and the key is missing or wrong, or it has a newer format.
    """
    state = State()
    state.problems += index.structure()
    index.load_meta(state, path)
    if state.meta is None:
        return state
    index.cipher = make_cipher(state.meta, path, secret)
    index.load(state, state.meta.pages)
    return state


def missing_pages(state: State, path: Path) -> list[str]:
    """Say which is the first page whose records are in no file: it and those behind it are computed again, as damaged ones."""
    if state.meta is None:
        return []
    counts = count_records(path, state.meta.pages)
    for page, row in enumerate(state.rows):
        if not all(is_counted(record, counts) for record in row.records):
            return [f"page {page} is missing in the page files"]
    whole = all(is_counted(record, counts) for record in state.tail.records)
    return [] if whole else ["the open page is missing in the page files"]


def make_cipher(meta: Meta, path: Path, secret: bytes | None) -> Cipher | None:
    """Return the cipher of a session, or None if it is plain.

    Raises:
        SessionMismatch: the key is missing or wrong, or the session is not encrypted though it should be.
    """
    if not meta.encrypted:
        if secret is not None:
            raise SessionMismatch(f"the session {path} is not encrypted; run without --encrypt, or start a new one")
        return None
    if secret is None:
        raise SessionMismatch(f"the session {path} is encrypted; run with --encrypt and its key")
    cipher = Cipher(secret, bytes.fromhex(meta.salt))
    if cipher.decrypt(bytes.fromhex(meta.probe), b"probe") is None:
        raise SessionMismatch(f"this is not the key of the session {path}")
    return cipher


def read_state(path: Path, secret: bytes | None) -> State:
    """Read the index of a session without locking it: the backup when it has more that is whole.

    Raises:
        SessionError: nothing can be read. SessionMismatch: see :func:`load_index`.
    """
    best = State(problems=["the index is missing"])
    for name in (INDEX, BACKUP):
        if not (path / name).exists():
            continue
        try:
            with index_copy(path, name) as index:
                found = load_index(index, path, secret)
        except SessionError as error:
            found = State(problems=[str(error)])
        if name == INDEX:
            best = found
            if found.meta and not found.problems:
                break
            found.problems = found.problems or ["the index holds nothing"]
        elif found.meta and (len(found.rows) > len(best.rows) or not best.meta):
            found.problems = [*best.problems, "its backup is used"]
            best = found
    return best


def replace_index(path: Path, state: State, secret: bytes | None) -> SessionIndex:
    """Put a new index in the place of a damaged one, which is kept as ``index.damaged``, or under the next free number.

    Raises:
        SessionError: it cannot be written.
    """
    names = (f"{DAMAGED}.{number}" if number else DAMAGED for number in itertools.count())
    kept = next(name for name in names if not (path / name).exists() and not (path / f"{name}-wal").exists())
    try:
        for suffix in ("-wal", ""):
            if (path / f"{INDEX}{suffix}").exists():
                os.replace(path / f"{INDEX}{suffix}", path / f"{kept}{suffix}")
    except OSError as error:
        raise SessionError(f"cannot write the session {path}: {error.strerror}") from error
    assert state.meta is not None
    index = SessionIndex(path / INDEX, create=True)
    index.begin(state.meta)
    index.cipher = make_cipher(state.meta, path, secret)
    index.commit(state, 0, 0)
    return index


def write_backup(path: Path) -> None:
    """Copy the index, which is closed and whole, beside itself."""
    temporary = path / f"{BACKUP}.tmp"
    with contextlib.suppress(OSError):  # a backup that cannot be written costs nothing now
        temporary.unlink(missing_ok=True)
        with os.fdopen(create_file(temporary), "wb") as stream:
            stream.write((path / INDEX).read_bytes())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path / BACKUP)


def session_key(manifest: Manifest, version: int = FORMAT) -> dict[str, str | int]:
    """Return what keys and values depend on; a session of format ``version`` is only used where all of it is equal.

    Engine and form are not in it: both engines and both forms of a checkpoint use the same sessions.
    """
    model = manifest.model

    def short(*numbers: float) -> str:
        return hashlib.sha256(np.array(numbers, "<f8").tobytes()).hexdigest()[:16]

    def short_1(*numbers: float) -> str:
        """Hash what no other language prints alike."""
        return hashlib.sha256(repr((numbers[:-1], numbers[-1])).encode()).hexdigest()[:16]

    hashed = short_1 if version == 1 else short
    return {
        "checkpoint": manifest.source_sha256,
        "weights": manifest.weights,
        "tokenizer": manifest.tokenizer_sha256,
        "geometry": f"{model.n_layers} layers, {model.n_q_heads}/{model.n_kv_heads} heads of {model.head_dim}",
        "rope": hashed(*(number for rope in model.ropes for number in (*rope.inv_freq, rope.attention_scaling))),
        "attention": hashed(*model.windows, model.softmax_scale, *([model.softcap] if model.softcap else [])),
        "page_size": manifest.page_size,
        "codec": CODEC_VERSION,
    }


def bits_key(manifest: Manifest, computed_by: str) -> dict[str, str | int]:
    """Return what keys and values depend on to the bit, besides tokens and steps: who shares them unseen has all of it equal.

    Args:
        computed_by: engine and kernels, see :attr:`Generator.computed_by`. Two that implement the same int8 or int4 products
            agree to about 2 %.
    """
    return {**session_key(manifest), "bundle": manifest.identity, "computed_by": computed_by}


def open_index(path: Path, manifest: Manifest | None, secret: bytes | None) -> tuple[State, SessionIndex | None]:
    """Open the index for writing; a new one gets its meta, a damaged one is replaced by what is whole of it.

    Raises:
        UnreadableIndex: the system refuses to open it, or the backup of a damaged one; neither is replaced.
    """
    index: SessionIndex | None = None
    if segment_paths(path) or (path / BACKUP).exists():  # at least one commit was made, so there must be an index
        try:
            index = SessionIndex(path / INDEX)
            state = load_index(index, path, secret)
        except UnreadableIndex:
            if index is not None:
                index.close()
            raise
        except SessionError as error:
            state = State(problems=[str(error)])
        except BaseException:
            if index is not None:
                index.close()
            raise
        if state.meta and not state.problems:
            return state, index
        if index is not None:
            index.close()
        _check_readable(path / BACKUP)
        state = read_state(path, secret)
        return state, replace_index(path, state, secret) if state.meta else None
    index = SessionIndex(path / INDEX, create=True)
    try:
        state = load_index(index, path, secret)
    except BaseException:
        index.close()
        raise
    if state.meta and state.problems:
        index.close()
        return state, replace_index(path, state, secret)
    if state.meta:
        return state, index
    if manifest is None:
        index.close()
        return state, None
    pages = manifest.model.pages(manifest.page_size)
    meta, index.cipher = new_meta(session_key(manifest), pages, secret)
    index.begin(meta)
    sync_folder(path)
    return State(meta=meta), index


def new_meta(key: dict[str, str | int], pages: PageSpec, secret: bytes | None) -> tuple[Meta, Cipher | None]:
    """Return what a new session is, and its cipher where it is encrypted."""
    meta = Meta(FORMAT, key, pages, created=time.time(), encrypted=False)
    if secret is None:
        return meta, None
    salt = os.urandom(SALT_BYTES)
    cipher = Cipher(secret, salt)
    probe = cipher.encrypt(b"", b"probe").hex()
    return dataclasses.replace(meta, encrypted=True, salt=salt.hex(), probe=probe), cipher


def _check_readable(backup: Path) -> None:
    """Refuse to go on without a backup that cannot be read now: it may hold more than what would take its place."""
    try:
        os.close(open_file(backup, os.O_RDONLY))
    except OSError as error:
        refused = cannot_open(backup, error)
        if isinstance(refused, UnreadableIndex):
            raise refused from error


def check_key(path: Path, meta: Meta, manifest: Manifest) -> None:
    """Refuse a session that was made with something else.

    Raises:
        SessionMismatch: the message names every difference.
    """
    had, has = meta.key, session_key(manifest, meta.format)
    different = [name for name in has if had.get(name) != has[name]]
    if different:
        facts = [
            f"{name.replace('_', ' ')} {_short(had.get(name))}, this bundle {_short(has[name])}" for name in different
        ]
        raise SessionMismatch(
            f"the session {path} was made with something else: {'; '.join(facts)}. Use the bundle that it was made"
            " with, or another session"
        )
    if meta.pages != manifest.model.pages(manifest.page_size):
        raise SessionMismatch(f"the session {path} contradicts itself: {meta.pages} is not what its key says")


def _short(value: object) -> str:
    text = printable(str(value))
    return text[:12] if len(text) == 64 else text


def share_segments(source: Path, target: Path, wear: WearLedger | None = None) -> bool:
    """Give ``target`` the page files of ``source``: by hard links, whose number the file system counts, or as copies.

    Args:
        wear: counts what is copied, and may refuse it.

    Returns:
        whether none had to be copied.

    Raises:
        WriteLimit, OSError: they cannot be shared; ``target`` has none of them.
    """
    made: list[Path] = []
    shared = True
    try:
        for path in segment_paths(source).values():
            made.append(target / path.name)
            try:
                os.link(path, made[-1])
            except OSError:
                _copy(path, made[-1], wear)
                shared = False
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    return shared


def _copy(source: Path, target: Path, wear: WearLedger | None) -> None:
    with os.fdopen(open_file(source, os.O_RDONLY), "rb") as pages:
        if wear is not None:
            wear.reserve(os.fstat(pages.fileno()).st_size)
        with os.fdopen(create_file(target), "wb") as copy:
            shutil.copyfileobj(pages, copy)


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back the signals that end programs until the block is done (in the main thread, where Python handles them)."""
    with ExitStack() as held:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
                if callable(signal.getsignal(number)):
                    held.enter_context(_held(number))
        yield


@contextmanager
def _held(number: int) -> Iterator[None]:
    came: list[int] = []
    before = signal.getsignal(number)
    try:
        signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        signal.signal(number, before)
        if came:
            signal.raise_signal(number)
