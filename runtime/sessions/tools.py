"""What can be done with a session apart from running it: describe, verify, compact, copy, remove."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from edgekv.errors import SessionError, SessionMismatch, StoreFull, UsageError
from edgekv.files import make_folder, reason
from edgekv.scratch import HIDDEN, ScratchFolder

from ..options import SessionOptions
from ..pages.manager import tag
from ..storage.segments import segment_paths, sync_folder
from ..system.buffers import aligned_rows
from .folder import is_session, missing_pages, read_state, take_lock
from .index import Row
from .restore import open_tags
from .session import Session

_BATCH_RECORDS = 64


def find_sessions(folder: Path) -> list[Path]:
    """Return the sessions in a folder, and the folders that cannot be looked into; the folder itself if it is one."""
    if is_session(folder):
        return [folder]
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")

    def may_be_one(path: Path) -> bool:
        try:
            return is_session(path)
        except PermissionError:
            return True

    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and may_be_one(path))


def describe(path: Path, secret: bytes | None = None) -> dict[str, Any]:
    """Return what a session holds, without opening it for writing; an encrypted one without its key shows less.

    Raises:
        UsageError: not a session. SessionError: its folder cannot be read.
    """
    try:
        return _describe(path, secret)
    except OSError as error:
        raise SessionError(f"cannot read the session {path}: {reason(error)}") from error


def _describe(path: Path, secret: bytes | None) -> dict[str, Any]:
    if not is_session(path):
        raise UsageError(f"{path} is not a session; edgekv sessions list DIR shows those of a folder")
    sizes = [(file.stat().st_blocks * 512, file.stat().st_nlink) for file in segment_paths(path).values()]
    facts: dict[str, Any] = {
        "path": str(path),
        "bytes_on_flash": sum(size for size, _ in sizes),
        "bytes_shared": sum(size for size, links in sizes if links > 1),
        "saved_at": max(file.stat().st_mtime for file in path.iterdir()),
    }
    try:
        state = read_state(path, secret)
    except SessionMismatch as error:
        return {**facts, "encrypted": True, "problems": [str(error)]}
    if not state.meta:
        return {**facts, "problems": state.problems}
    size = state.meta.pages.page_size
    return {
        **facts,
        "encrypted": state.meta.encrypted,
        "tokens": len(state.rows) * size + len(state.tail.tokens),
        "pages": len(state.rows),
        "open_page_stored": bool(state.tail.records),
        "messages": len(state.notes.get("messages", [])),
        "created_at": state.meta.created,
        "key": state.meta.key,
        "problems": state.problems + missing_pages(state, path),
    }


def contents(path: Path, secret: bytes | None = None) -> dict[str, Any]:
    """Return the tokens of a session and what the application kept with them, such as ``messages``.

    Raises:
        UsageError: not a session. SessionError, SessionMismatch: it cannot be read.
    """
    if not is_session(path):
        raise UsageError(f"{path} is not a session")
    state = read_state(path, secret)
    if not state.meta:
        raise SessionError(f"the index of {path} cannot be read: {'; '.join(state.problems)}")
    tokens = [token for row in state.rows for token in row.tokens] + list(state.tail.tokens)
    return {"key": state.meta.key, "tokens": tokens, **state.notes}


def verify(path: Path, secret: bytes | None = None) -> tuple[list[str], int]:
    """Read every row and every record of a session and check them; nothing is written.

    Returns:
        what is wrong, and how many tokens, from the first on, can still be used.

    Raises:
        StoreLocked: a process has it open. UsageError, SessionError, SessionMismatch: it cannot be read.
    """
    if not is_session(path):
        raise UsageError(f"{path} is not a session")
    lock = take_lock(path)
    try:
        state = read_state(path, secret)
        if not state.meta:
            return state.problems or ["the index holds nothing"], 0
        session = Session.open(SessionOptions(path, secret=secret), None, save=False)
        try:
            problems, usable = list(state.problems), len(state.rows)
            for page, row in enumerate(state.rows):
                bad = [layer for layer, good in enumerate(_read(session, row.records, _tags(page, row))) if not good]
                if bad:
                    usable = min(usable, page)
                    problems.append(f"page {page}: {_list('layer', bad)} damaged or missing")
            tail = state.tail
            if tail.records:
                tags = open_tags(session.store.spec.n_layers, tail.n_pages, state.meta.format)
                if not all(_read(session, tail.records, tags)):
                    problems.append("the open page is damaged; its tokens are computed again")
            size = session.store.spec.page_size
            whole = usable == len(state.rows)
            return problems, usable * size + (len(tail.tokens) if whole else 0)
        finally:
            session.close()
    finally:
        if lock is not None:
            os.close(lock)


def compact(path: Path, secret: bytes | None = None) -> tuple[int, int]:
    """Write the records that are in use, in order, into one new file and remove the old ones.

    A file that another session shares stays there for the other one.

    Returns:
        bytes of the page files before and after.

    Raises:
        StoreLocked: a process has it open. StoreFull, StoreError: it could not be written; the session is as it was.
        SessionError: a record is damaged; verify names it.
    """
    session = Session.open(SessionOptions(path, secret=secret), None)
    try:
        if session.read_only is not None:
            raise SessionError(f"the session {path} cannot be written: {session.read_only}")
        before = _flash_bytes(path)
        session.rewrite()
        return before, _flash_bytes(path)
    finally:
        session.close()


def copy(path: Path, target: Path, secret: bytes | None = None) -> None:
    """Make an independent, compact copy of a session.

    Raises:
        UsageError: the target exists. StoreLocked, StoreError, SessionError: see :func:`compact`.
    """
    if target.exists():
        raise UsageError(f"{target} exists already; choose another name for the copy")
    try:
        make_folder(target.parent)
        with ScratchFolder(target.parent, HIDDEN) as scratch:
            made = scratch.path / target.name
            try:
                fork(path, made, secret)
            except SessionError as error:  # of the folder beside the target, which nobody has heard of
                raise error.__cause__ if isinstance(error.__cause__, OSError) else error from None
            compact(made, secret)
            os.rename(made, target)
        sync_folder(target.parent)
    except StoreFull as error:
        raise StoreFull(
            f"{target.parent} is full, nothing was copied; free some space, or choose another place"
        ) from error
    except OSError as error:
        raise SessionError(f"cannot make the session {target}: {error.strerror}; choose another place") from error


def fork(path: Path, target: Path, secret: bytes | None = None) -> bool:
    """Make another session that begins as this one; returns whether they share their pages. See :meth:`Session.fork`."""
    session = Session.open(SessionOptions(path, secret=secret), None)
    try:
        return session.fork(target)
    finally:
        session.close()


def remove(path: Path) -> int:
    """Delete a session; pages that another session shares stay for the other one.

    Returns:
        bytes that the file system got back.

    Raises:
        UsageError: not a session. StoreLocked: a process has it open. SessionError: it cannot be deleted.
    """
    if not is_session(path):
        raise UsageError(f"{path} is not a session; nothing was removed")
    lock = take_lock(path)
    if lock is None:
        raise SessionError(f"the session {path} cannot be removed: its files cannot be written")
    try:
        freed = sum(
            file.stat().st_blocks * 512 for file in path.iterdir() if file.is_file() and file.stat().st_nlink == 1
        )
        with ScratchFolder(path.parent, HIDDEN) as scratch:
            os.rename(path, scratch.path / path.name)  # at once: no half of a session is left under its name
            shutil.rmtree(scratch.path / path.name)
        sync_folder(path.parent)
        return freed
    except OSError as error:
        raise SessionError(f"cannot remove {path}: {error.strerror}") from error
    finally:
        os.close(lock)


def _read(session: Session, records: tuple[int, ...], tags: list[int]) -> list[bool]:
    good: list[bool] = []
    buffer = aligned_rows(min(len(records), _BATCH_RECORDS), session.store.spec.record_bytes)
    for start in range(0, len(records), _BATCH_RECORDS):
        stop = start + _BATCH_RECORDS
        part = list(records[start:stop])
        good += session.store.try_read(part, tags[start:stop], buffer[: len(part)])
    return good


def _tags(page: int, row: Row) -> list[int]:
    return [tag(layer, page) for layer in range(len(row.records))]


def _list(name: str, numbers: list[int]) -> str:
    return f"{name}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _flash_bytes(path: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in segment_paths(path).values())
