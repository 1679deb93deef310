"""The index of a session: which tokens are in which pages, and where their records are. SQLite in WAL mode.

SQLite does not check its pages, so every row carries its own xxh3 checksum over its name and its value. What a row refers
to is checked in turn by the checksums of the records that it holds. ::

    item(name TEXT PRIMARY KEY, value BLOB, xxh3 BLOB)
      meta       JSON, see Meta
      notes      JSON: what the application wants to keep, such as the messages of a conversation
      tail       JSON, see Tail
      page N     tokens [page_size] int32, records [n_layers] int64, checksums [n_layers] uint64, little endian, and
                 16 bytes that stand for all tokens up to here: a row of another history is not believed. Without
                 records and checksums where every token of the page was pruned

All but ``meta`` are ciphertext in an encrypted session. docs/flash_format.md says all of it to the byte.

Sessions of format 1 are read, and written as such by who has no bundle at hand; the first checkpoint of a run makes format 2
of them. They differ in the byte order of the rows' checksums (big endian), the tags of the open page
(:func:`~edgekv.runtime.sessions.restore.open_tags`) and the hashes of the key
(:func:`~edgekv.runtime.sessions.folder.session_key`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import operator
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from edgekv.errors import FormatError, SessionError, SessionMismatch
from edgekv.files import open_file, reason
from edgekv.schema import Bytes, Moment, Natural, Positive, checked, from_json, plain_json
from edgekv.spec import PageSpec

from ..storage.cipher import SALT_BYTES, Cipher

FORMAT = 2
INDEX = "index.sqlite"
BACKUP = "index.backup"
DAMAGED = "index.damaged"
#: What SQLite answers where the file is wrong and not the reading of it: ERROR, CORRUPT, SCHEMA, TOOBIG, MISMATCH, FORMAT, NOTADB
#: (https://sqlite.org/rescode.html), and that it is too short.
_WRONG_FILE, _SHORT_READ = (1, 11, 17, 18, 20, 24, 26), 522
#: Nothing is there, or what is no file (without a number: what :func:`edgekv.files.open_file` refuses).
_NOT_AN_INDEX = (None, errno.ENOENT, errno.EISDIR, errno.ENXIO, errno.ELOOP)


@dataclass(frozen=True)
class Row:
    """A sealed page of all layers: its tokens, per layer its record and the record's checksum, and :func:`chain`.

    ``records``, ``checks``: empty when every token was pruned, so that nothing is stored.
    """

    tokens: tuple[int, ...]
    records: tuple[int, ...]
    checks: tuple[int, ...]
    chain: bytes


@dataclass(frozen=True)
class Meta:
    """What a session is: row ``meta``.

    ``key``: see :func:`~edgekv.runtime.sessions.folder.session_key`.
    """

    format: Annotated[Positive, msgspec.Meta(description="version of the session format")]
    key: Annotated[
        dict[str, str | int], msgspec.Meta(description="what keys and values depend on: the compatibility key")
    ]
    pages: Annotated[PageSpec, msgspec.Meta(description="the shape of the pages")]
    created: Annotated[Moment, msgspec.Meta(description="seconds since 1970")]
    encrypted: Annotated[bool, msgspec.Meta(description="whether all but this row is ciphertext")]
    salt: Annotated[str, msgspec.Meta(description="of the key, in hexadecimal; empty in a plain session")] = ""
    probe: Annotated[
        str, msgspec.Meta(description="nothing, encrypted, in hexadecimal: shows whether a key is the right one")
    ] = ""

    def __post_init__(self) -> None:
        if self.encrypted and len(bytes.fromhex(self.salt)) != SALT_BYTES:
            raise FormatError(f"the salt of an encrypted session has {SALT_BYTES} bytes")
        bytes.fromhex(self.probe)


@dataclass(frozen=True)
class Tail:
    """What comes after the sealed pages.

    ``steps``: see :meth:`Steps.lengths`; ``starts`` is what the first versions wrote instead: positions at which the last ones
    began.
    """

    n_pages: Annotated[Natural, msgspec.Meta(description="sealed pages: rows `page 0` .. `page n_pages - 1`")] = 0
    tokens: Annotated[tuple[Natural, ...], msgspec.Meta(description="the tokens after those of the sealed pages")] = ()
    n_kv: Annotated[
        Natural, msgspec.Meta(description="how many tokens of the session, from its first, have keys and values")
    ] = 0
    starts: tuple[Natural, ...] = ()
    records: Annotated[
        tuple[Bytes, ...],
        msgspec.Meta(
            description="of the open page: keys of layer 0, values of layer 0, keys of layer 1 ...; empty: not stored"
        ),
    ] = ()
    checks: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0)], ...], msgspec.Meta(description="the checksums of these records")
    ] = ()
    chain: Annotated[
        str, msgspec.Meta(description="chain of the last sealed page, in hexadecimal; empty without one")
    ] = ""
    pruned: Annotated[
        tuple[Natural, ...],
        msgspec.Meta(
            description="positions whose tokens were pruned: start, stop, start, stop ..., each stop excluded"
        ),
    ] = ()
    steps: Annotated[
        tuple[Positive, ...],
        msgspec.Meta(
            description="in which steps tokens were computed: length, how many in a row, length, how many ..."
        ),
    ] = ()

    def check(self, spec: PageSpec) -> None:
        """Hold the fields against each other and the shape of the pages.

        Raises:
            FormatError: no session ends like this.
        """
        held = self.n_pages * spec.page_size + len(self.tokens)
        increasing = all(map(operator.lt, self.pruned, self.pruned[1:]))
        wrong = {
            "n_kv": self.n_kv > held,
            "starts": any(start > held for start in self.starts),
            "records": len(self.records) not in (0, 2 * spec.n_layers),
            "checks": len(self.checks) != len(self.records) or any(check >> 64 for check in self.checks),
            "pruned": len(self.pruned) % 2 != 0 or not increasing or any(place > held for place in self.pruned),
            "steps": len(self.steps) % 2 != 0 or sum(map(operator.mul, self.steps[::2], self.steps[1::2])) > held,
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise FormatError(f"{name} does not fit the rest")


@dataclass
class State:
    """What an index holds. ``problems``: what is damaged; everything here is whole."""

    meta: Meta | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    tail: Tail = field(default_factory=Tail)
    problems: list[str] = field(default_factory=list)


def chain(before: bytes, tokens: Sequence[int]) -> bytes:
    """Return 16 bytes that stand for a page's tokens and all tokens before them; ``before`` is b"" for the first."""
    return hashlib.blake2b(before + np.asarray(tokens, "<i4").tobytes(), digest_size=16).digest()


def to_ranges(positions: Sequence[int]) -> tuple[int, ...]:
    """Write increasing positions as ranges: start, stop, start, stop."""
    ranges: list[int] = []
    for position in positions:
        if ranges and ranges[-1] == position:
            ranges[-1] = position + 1
        else:
            ranges += [position, position + 1]
    return tuple(ranges)


def from_ranges(ranges: Sequence[int]) -> NDArray[np.int64]:
    """Return the positions [n] int64 that :func:`to_ranges` wrote."""
    pairs = zip(ranges[::2], ranges[1::2], strict=True)
    return np.concatenate([np.arange(start, stop) for start, stop in pairs] or [np.empty(0, np.int64)])


def row_check(name: str, value: bytes, version: int = FORMAT) -> bytes:
    """Return the checksum of a row in a session of format ``version``."""
    checksum = xxhash.xxh3_64_intdigest(name.encode() + b"\0" + value)
    return checksum.to_bytes(8, "big" if version == 1 else "little")


class UnreadableIndex(SessionError):
    """The system refuses to open an index, or to read it: nothing is known of what it holds, so nothing may take its place."""


class SessionIndex:
    """The open index of one session.

    Raises (from the constructor):
        UnreadableIndex: the system refuses to open or to read it. SessionError: it is no file of ours, or SQLite cannot open it.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        self.version = FORMAT
        self.cipher: Cipher | None = None
        self._db = sqlite3.connect(":memory:")
        try:
            check_own(path, create=create)
        except OSError as error:
            raise cannot_open(path, error) from error
        try:
            self._db = connect(path)
            if create:
                self._db.execute(
                    "CREATE TABLE IF NOT EXISTS item(name TEXT PRIMARY KEY, value BLOB, xxh3 BLOB) WITHOUT ROWID"
                )
        except sqlite3.Error as error:
            self.close()
            kind = SessionError if _wrong_file(error) else UnreadableIndex
            raise kind(f"cannot open the index {path}: {error}") from error

    # -- reading -----------------------------------------------------------------------------------------------

    def load_meta(self, state: State, path: Path) -> None:
        """Read ``meta``; an index without it was never committed to.

        Args:
            path: of the session, for the message.

        Raises:
            SessionMismatch: it has a newer format.
        """
        found = self._found("meta", state)
        if found is None:
            return
        try:
            data = plain_json(found[0])
            version = data.get("format") if isinstance(data, dict) else None
            self.version = version if isinstance(version, int) else FORMAT
            if self._value("meta", state) is None:
                return
            if self.version > FORMAT:
                raise SessionMismatch(
                    f"{path} has session format {version}, this edgekv reads up to {FORMAT}; upgrade it"
                )
            state.meta = checked(data, Meta)
        except FormatError as error:
            state.problems.append(f"meta is damaged: {error}")

    def load(self, state: State, spec: PageSpec) -> None:
        """Read everything else, up to the first damage."""
        value, notes = self._plain("tail", state), self._plain("notes", state)
        try:
            tail = from_json(value, Tail) if value else Tail()
            tail.check(spec)
            state.notes = from_json(notes, dict[str, Any]) if notes else {}
            checked(state.notes.get("messages", []), list[dict[str, Any]], "messages")
        except FormatError as error:
            state.problems.append(f"tail or notes are damaged: {error}")
            value, tail, state.notes = None, Tail(), {}
        for page in range(tail.n_pages if value else 1 << 31):
            packed = self._plain(f"page {page}", state)
            if packed is None:
                if value:
                    state.problems.append(f"page {page} is missing in the index")
                elif state.rows and not state.problems:
                    state.problems.append("tail is missing in the index")
                return
            row = _unpack(packed, spec)
            if row is None:
                state.problems.append(f"page {page} is not of this shape")
                return
            if row.chain != chain(state.rows[-1].chain if state.rows else b"", row.tokens):
                state.problems.append(f"page {page} belongs to another history")
                return
            state.rows.append(row)
        if tail.chain == (state.rows[-1].chain.hex() if state.rows else ""):
            state.tail = tail
        else:
            state.problems.append("tail belongs to another history")

    def _plain(self, name: str, state: State) -> bytes | None:
        value = self._value(name, state)
        if value is None or self.cipher is None:
            return value
        plain = self.cipher.decrypt(value, name.encode())
        if plain is None:
            state.problems.append(f"{name} does not decrypt")
        return plain

    def _value(self, name: str, state: State) -> bytes | None:
        found = self._found(name, state)
        if found is None:
            return None
        value, check = found
        if check != row_check(name, value, self.version):
            state.problems.append(f"{name} differs from its checksum")
            return None
        return value

    def _found(self, name: str, state: State) -> tuple[bytes, bytes] | None:
        """Return the value of a row and its checksum, not yet compared."""
        try:
            found: tuple[bytes, bytes] | None = self._db.execute(
                "SELECT value, xxh3 FROM item WHERE name = ?", (name,)
            ).fetchone()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            self._check_wrong(error)
            state.problems.append(f"{name} cannot be read: {error}")
            return None
        if found is not None and not isinstance(found[0], bytes):
            state.problems.append(f"{name} differs from its checksum")
            return None
        return found

    def structure(self) -> list[str]:
        """Return what SQLite finds wrong with the file.

        Raises:
            UnreadableIndex: the system does not give all of it.
        """
        try:
            return [str(row[0]) for row in self._db.execute("PRAGMA integrity_check(8)") if row[0] != "ok"]
        except (sqlite3.Error, UnicodeDecodeError) as error:
            self._check_wrong(error)
            return [str(error)]

    def _check_wrong(self, error: Exception) -> None:
        if isinstance(error, sqlite3.Error) and not _wrong_file(error):
            raise UnreadableIndex(f"cannot read the index {self.path}: {error}") from error

    # -- writing -----------------------------------------------------------------------------------------------

    def begin(self, meta: Meta) -> None:
        """Write the first commit.

        Raises:
            SessionError: SQLite cannot write.
        """
        self._run([_meta_item(meta)], 0, 0, meta.format)

    def commit(self, state: State, kept: int, old: int) -> None:
        """Replace the pages from ``kept`` on (there were ``old``), the tail and the notes, atomically and durably.

        All rows are replaced where the format of ``state.meta`` is another one than that of the index.

        Raises:
            SessionError: SQLite cannot write; the last commit stands.
        """
        assert state.meta is not None
        same = state.meta.format == self.version
        items = [(f"page {page}", _pack(state.rows[page])) for page in range(kept if same else 0, len(state.rows))]
        tail = dataclasses.asdict(state.tail)
        if not tail["starts"]:
            del tail["starts"]
        items.append(("tail", json.dumps(tail).encode()))
        items.append(("notes", json.dumps(state.notes).encode()))
        if self.cipher is not None:
            items = [(name, self.cipher.encrypt(value, name.encode())) for name, value in items]
        self._run(items if same else [_meta_item(state.meta), *items], len(state.rows), old, state.meta.format)

    def _run(self, items: list[tuple[str, bytes]], n_pages: int, old: int, version: int) -> None:
        try:
            write_at_once(
                self._db,
                [
                    ("DELETE FROM item WHERE name = ?", [(f"page {page}",) for page in range(n_pages, old)]),
                    (
                        "INSERT OR REPLACE INTO item VALUES (?, ?, ?)",
                        [(name, value, row_check(name, value, version)) for name, value in items],
                    ),
                ],
            )
            self.version = version
        except sqlite3.Error as error:
            raise SessionError(f"cannot write the index {self.path}: {error}; the last checkpoint stands") from error

    def fold(self) -> None:
        """Move everything from the write-ahead log into the file."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def connect(path: Path) -> sqlite3.Connection:
    """Open a file of SQLite whose folder a lock keeps to one process; each commit survives a power loss.

    Raises:
        sqlite3.Error: it cannot be opened.
    """
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None, check_same_thread=False)
    try:
        # The lock keeps others out; without shared memory this works on any file system.
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
    except UnicodeDecodeError as error:  # a damaged file: SQLite's message quotes what it holds
        db.close()
        raise sqlite3.DatabaseError(f"damaged, in what its tables are called ({error.reason})") from error
    except BaseException:
        db.close()
        raise
    return db


def write_at_once(db: sqlite3.Connection, steps: Sequence[tuple[str, Sequence[tuple[Any, ...]]]]) -> None:
    """Run statements, each for all of its rows of values, in one transaction.

    Raises:
        sqlite3.Error: one failed; nothing changed.
    """
    try:
        db.execute("BEGIN IMMEDIATE")
        for statement, values in steps:
            db.executemany(statement, values)
        db.execute("COMMIT")
    except sqlite3.Error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def cannot_open(path: Path, error: OSError) -> SessionError:
    """Return the error of an index that cannot be opened: it is none, or the system refuses to open it."""
    kind = SessionError if error.errno in _NOT_AN_INDEX else UnreadableIndex
    return kind(f"cannot open the index {path}: {reason(error)}")


def _wrong_file(error: sqlite3.Error) -> bool:
    """Say whether an error of reading tells that the file is damaged, and not that it cannot be read now."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    if code is None:  # Python 3.10
        return not str(error).startswith(("disk I/O error", "database or disk is full", "out of memory"))
    return code & 0xFF in _WRONG_FILE or code == _SHORT_READ


def check_own(path: Path, *, create: bool) -> None:
    """Refuse files of SQLite that are links or another user's; ``create``: make the first if it is not there."""
    os.close(open_file(path, os.O_RDWR | (os.O_CREAT if create else 0)))
    for suffix in ("-wal", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.close(open_file(path.with_name(path.name + suffix), os.O_RDWR))


def _meta_item(meta: Meta) -> tuple[str, bytes]:
    return "meta", json.dumps(dataclasses.asdict(meta)).encode()


def _pack(row: Row) -> bytes:
    return (
        np.asarray(row.tokens, "<i4").tobytes()
        + np.asarray(row.records, "<i8").tobytes()
        + np.asarray(row.checks, "<u8").tobytes()
        + row.chain
    )


def _unpack(packed: bytes, spec: PageSpec) -> Row | None:
    """Read a row; None if it is none of pages of this shape."""
    size, layers = spec.page_size, spec.n_layers if len(packed) > 4 * spec.page_size + 16 else 0
    if len(packed) != 4 * size + 16 * layers + 16:
        return None
    tokens = np.frombuffer(packed, "<i4", size)
    records = np.frombuffer(packed, "<i8", layers, 4 * size)
    checks = np.frombuffer(packed, "<u8", layers, 4 * size + 8 * layers)
    if tokens.min() < 0 or (records < 0).any():
        return None
    return Row(tuple(tokens.tolist()), tuple(records.tolist()), tuple(checks.tolist()), packed[-16:])
