"""The index of a session: which tokens are in which pages, and where their records are. SQLite in WAL mode.

SQLite does not check its pages, so every row carries its own xxh3 checksum over its name and its value. What a row refers
to is checked in turn by the checksums of the records that it holds. ::

    item(name TEXT PRIMARY KEY, value BLOB, xxh3 BLOB)
      meta       JSON: format, key (what the session was made with), salt of the encryption, time of creation
      notes      JSON: what the application wants to keep, such as the messages of a conversation
      tail       JSON, see Tail
      page N     tokens [page_size] int32, records [n_layers] int64, checksums [n_layers] uint64, little endian, and
                 16 bytes that stand for all tokens up to here: a row of another history is not believed. Without
                 records and checksums where every token of the page was pruned

All but ``meta`` are ciphertext in an encrypted session.
"""

from __future__ import annotations

import contextlib
import dataclasses
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

FORMAT = 1
INDEX = "index.sqlite"
BACKUP = "index.backup"
DAMAGED = "index.damaged"


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

    ``key``: what its keys and values depend on, see :func:`~edgekv.runtime.sessions.folder.session_key`. ``created``: seconds
    since 1970. ``salt``, ``probe``: in hexadecimal, of an encrypted session; the probe shows whether a key is the right one.
    """

    format: Positive
    key: dict[str, str | int]
    pages: PageSpec
    created: Moment
    encrypted: bool
    salt: str = ""
    probe: str = ""

    def __post_init__(self) -> None:
        if self.encrypted and len(bytes.fromhex(self.salt)) != SALT_BYTES:
            raise FormatError(f"the salt of an encrypted session has {SALT_BYTES} bytes")
        bytes.fromhex(self.probe)


@dataclass(frozen=True)
class Tail:
    """What comes after the sealed pages.

    ``tokens``: after the last sealed page. ``n_kv``: how many tokens of the session, from its first, had keys and values
    (the last one that was generated has none yet). ``steps``: in which steps tokens are computed, also again, see
    :meth:`Steps.lengths`; ``starts`` is what older versions wrote instead: positions at which the last ones began.
    ``records``, ``checks``: the open page as fp16, two records per layer; empty when it was not stored.
    ``chain``: of the last sealed page, in hexadecimal. ``pruned``: [start, stop) of the positions whose tokens were pruned,
    one after the other; they are masked again when the session is resumed.
    """

    n_pages: Natural = 0
    tokens: tuple[Natural, ...] = ()
    n_kv: Natural = 0
    starts: tuple[Natural, ...] = ()
    records: tuple[Bytes, ...] = ()
    checks: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    chain: str = ""
    pruned: tuple[Natural, ...] = ()
    steps: tuple[Positive, ...] = ()

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


def row_check(name: str, value: bytes) -> bytes:
    """Return the checksum of a row."""
    return xxhash.xxh3_64_digest(name.encode() + b"\0" + value)


class SessionIndex:
    """The open index of one session.

    Raises (from the constructor):
        SessionError: SQLite cannot open it.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        self.cipher: Cipher | None = None
        self._db = sqlite3.connect(":memory:")
        try:
            _check_own(path, create=create)
        except OSError as error:
            raise SessionError(f"cannot open the index {path}: {reason(error)}") from error
        try:
            self._db = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None, check_same_thread=False
            )
            # The lock of the session keeps others out; without shared memory this works on any file system.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            if create:
                self._db.execute(
                    "CREATE TABLE IF NOT EXISTS item(name TEXT PRIMARY KEY, value BLOB, xxh3 BLOB) WITHOUT ROWID"
                )
        except sqlite3.Error as error:
            self.close()
            raise SessionError(f"cannot open the index {path}: {error}") from error

    # -- reading -----------------------------------------------------------------------------------------------

    def load_meta(self, state: State, path: Path) -> None:
        """Read ``meta``; an index without it was never committed to.

        Args:
            path: of the session, for the message.

        Raises:
            SessionMismatch: it has a newer format.
        """
        value = self._value("meta", state)
        if value is None:
            return
        try:
            data = plain_json(value)
            version = data.get("format") if isinstance(data, dict) else None
            if isinstance(version, int) and version > FORMAT:
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
        try:
            found = self._db.execute("SELECT value, xxh3 FROM item WHERE name = ?", (name,)).fetchone()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            state.problems.append(f"{name} cannot be read: {error}")
            return None
        if found is None:
            return None
        if not isinstance(found[0], bytes) or found[1] != row_check(name, found[0]):
            state.problems.append(f"{name} differs from its checksum")
            return None
        return found[0]

    def structure(self) -> list[str]:
        """Return what SQLite finds wrong with the file."""
        try:
            return [str(row[0]) for row in self._db.execute("PRAGMA integrity_check(8)") if row[0] != "ok"]
        except (sqlite3.Error, UnicodeDecodeError) as error:
            return [str(error)]

    # -- writing -----------------------------------------------------------------------------------------------

    def begin(self, meta: Meta) -> None:
        """Write the first commit.

        Raises:
            SessionError: SQLite cannot write.
        """
        self._run([("meta", json.dumps(dataclasses.asdict(meta)).encode())], 0, 0)

    def commit(self, state: State, kept: int, old: int) -> None:
        """Replace the pages from ``kept`` on (there were ``old``), the tail and the notes, atomically and durably.

        Raises:
            SessionError: SQLite cannot write; the last commit stands.
        """
        items = [(f"page {page}", _pack(state.rows[page])) for page in range(kept, len(state.rows))]
        items.append(("tail", json.dumps(dataclasses.asdict(state.tail)).encode()))
        items.append(("notes", json.dumps(state.notes).encode()))
        if self.cipher is not None:
            items = [(name, self.cipher.encrypt(value, name.encode())) for name, value in items]
        self._run(items, len(state.rows), old)

    def _run(self, items: list[tuple[str, bytes]], n_pages: int, old: int) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("DELETE FROM item WHERE name = ?", [(f"page {page}",) for page in range(n_pages, old)])
            self._db.executemany(
                "INSERT OR REPLACE INTO item VALUES (?, ?, ?)",
                [(name, value, row_check(name, value)) for name, value in items],
            )
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise SessionError(f"cannot write the index {self.path}: {error}; the last checkpoint stands") from error

    def fold(self) -> None:
        """Move everything from the write-ahead log into the file."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _check_own(path: Path, *, create: bool) -> None:
    """Refuse files of SQLite that are links or another user's; ``create``: make the first if it is not there."""
    os.close(open_file(path, os.O_RDWR | (os.O_CREAT if create else 0)))
    for suffix in ("-wal", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.close(open_file(path.with_name(path.name + suffix), os.O_RDWR))


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
