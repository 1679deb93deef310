"""The index of a library: which pages and turns are kept, and where their records are.

SQLite in WAL mode::

    item(name TEXT PRIMARY KEY, value BLOB, xxh3 BLOB)    meta: JSON, see Meta of a session's index
    page(number INTEGER PRIMARY KEY, used INTEGER, value BLOB, xxh3 BLOB)    MessagePack, see PageRow
    turn(number INTEGER PRIMARY KEY, used INTEGER, value BLOB, xxh3 BLOB)    MessagePack, see TurnRow

As in a session's index, a row carries its own checksum, over its table, number and value, and in an encrypted library all but
``meta`` is ciphertext. What is damaged is left out, with all behind it: a library loses time by that, never a result.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from edgekv.errors import FormatError, StoreError
from edgekv.files import reason
from edgekv.schema import checked, plain_json

from ..sessions.index import Meta, check_own, connect, row_check, write_at_once
from ..storage.cipher import Cipher

Number = Annotated[int, msgspec.Meta(ge=0)]


class PageRow(msgspec.Struct, frozen=True, array_like=True):
    """A page: behind which other (0: none), whose, and what :class:`~edgekv.runtime.serving.tree.Node` has."""

    parent: Number
    owner: bytes
    tokens: tuple[Number, ...]
    cuts: tuple[Number, ...]
    records: tuple[Number, ...]
    checks: tuple[Number, ...]


class TurnRow(msgspec.Struct, frozen=True, array_like=True):
    """A turn: behind which page (0: none), whose, and what :class:`~edgekv.runtime.serving.tree.Turn` has."""

    node: Number
    owner: bytes
    tokens: tuple[Number, ...]
    n_kv: Number
    cuts: tuple[Number, ...]
    records: tuple[Number, ...]
    checks: tuple[Number, ...]


Row = TypeVar("Row", PageRow, TurnRow)


class LibraryIndex:
    """The open index of one library; the lock of its folder keeps others out.

    Raises (from the constructor):
        StoreError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cipher: Cipher | None = None
        try:
            check_own(path, create=True)
        except OSError as error:
            raise StoreError(f"cannot open the cache of requests {path}: {reason(error)}") from error
        try:
            self._db = connect(path)
            try:
                for table, key in (("item", "name TEXT"), ("page", "number INTEGER"), ("turn", "number INTEGER")):
                    used = "" if table == "item" else "used INTEGER, "
                    self._db.execute(
                        f"CREATE TABLE IF NOT EXISTS {table}({key} PRIMARY KEY, {used}value BLOB, xxh3 BLOB) WITHOUT ROWID"
                    )
            except BaseException:
                self._db.close()
                raise
        except sqlite3.Error as error:
            raise StoreError(
                f"cannot open the cache of requests {path}: {error}; move it away to begin anew"
            ) from error

    def meta(self) -> Meta | None:
        """Return what the library is; None where it is new.

        Raises:
            StoreError: it is damaged.
        """
        try:
            found = self._db.execute("SELECT value, xxh3 FROM item WHERE name = 'meta'").fetchone()
            if found is None:
                return None
            if found[1] != row_check("meta", found[0]):
                raise FormatError("meta differs from its checksum")
            return checked(plain_json(found[0]), Meta)
        except (sqlite3.Error, FormatError, TypeError) as error:
            raise StoreError(
                f"the cache of requests {self.path} is damaged ({error}); move it away to begin anew"
            ) from error

    def begin(self, meta: Meta) -> None:
        """Write what the library is.

        Raises:
            StoreError: SQLite cannot write.
        """
        value = json.dumps(asdict(meta)).encode()
        self._write([("INSERT OR REPLACE INTO item VALUES ('meta', ?, ?)", [(value, row_check("meta", value))])])

    def rows(self, kind: type[Row]) -> Iterator[tuple[int, int, Row]]:
        """Yield (number, used, row) of every whole page or turn, in the order in which they were added."""
        table = "page" if kind is PageRow else "turn"
        decoder = msgspec.msgpack.Decoder(kind)
        try:
            for number, used, value, check in self._db.execute(
                f"SELECT number, used, value, xxh3 FROM {table} ORDER BY number"
            ):
                name = f"{table} {number}"
                if not (isinstance(value, bytes) and isinstance(used, int) and check == row_check(name, value)):
                    continue
                plain = value if self.cipher is None else self.cipher.decrypt(value, name.encode())
                if plain is not None:
                    try:
                        yield number, used, decoder.decode(plain)
                    except msgspec.DecodeError:
                        continue
        except sqlite3.Error:  # a damaged file: what came before it is whole
            return

    def commit(
        self,
        added: Iterable[tuple[int, int, PageRow | TurnRow]],
        gone: Iterable[tuple[str, int]],
        used: Iterable[tuple[str, int, int]],
    ) -> None:
        """Write what changed, at once and durably.

        Args:
            added: (number, used, row). gone: (table, number). used: (table, number, when).

        Raises:
            StoreError: SQLite cannot write; the last commit stands.
        """
        steps: list[tuple[str, list[tuple[object, ...]]]] = []
        for table, number in gone:
            steps.append((f"DELETE FROM {table} WHERE number = ?", [(number,)]))
        for number, when, row in added:
            table = "page" if isinstance(row, PageRow) else "turn"
            name, value = f"{table} {number}", msgspec.msgpack.encode(row)
            if self.cipher is not None:
                value = self.cipher.encrypt(value, name.encode())
            steps.append(
                (f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?)", [(number, when, value, row_check(name, value))])
            )
        for table, number, when in used:
            steps.append((f"UPDATE {table} SET used = ? WHERE number = ?", [(when, number)]))
        self._write(steps)

    def _write(self, steps: list[tuple[str, list[tuple[object, ...]]]]) -> None:
        try:
            write_at_once(self._db, steps)
        except sqlite3.Error as error:
            raise StoreError(f"cannot write the cache of requests {self.path}: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._db.close()
