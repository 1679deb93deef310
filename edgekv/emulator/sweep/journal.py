"""The journal beside a table: the rows of a sweep that is not done, and the lock that keeps a second sweep out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from edgekv.errors import EdgeKVError, FormatError, StoreLocked, UsageError
from edgekv.schema import plain_json

from .case import COLUMNS, Row

if sys.platform != "win32":
    import fcntl

#: What every line of a journal begins with.
_BEGINS = b'{"key": '


class Journal:
    """``OUT.partial``, locked until the end of the block; it stays behind the block with the rows that are in it.

    The lock is the system's, which takes it back from a process that is killed.

    Raises (from the constructor):
        StoreLocked: another sweep has it. UsageError: it cannot be written, or the file is no journal.
    """

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(out.name + ".partial")
        try:
            self._handle = _open(self.path)
            held = self.path.read_bytes()
        except BlockingIOError as error:
            raise StoreLocked(f"another sweep writes {out}; wait until it ends, or choose another --out") from error
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror}; choose another --out") from error
        if not held.startswith(_BEGINS[: len(held)]):
            os.close(self._handle)
            raise UsageError(f"{self.path} is not the journal of a sweep; move it away, or choose another --out")
        self._whole = held[: held.rfind(b"\n") + 1]
        os.ftruncate(self._handle, len(self._whole))  # a line was cut short when its sweep was killed

    def rows(self) -> Iterator[Row]:
        """Read the rows that an earlier sweep left; one of an older version is computed again."""
        for line in self._whole.splitlines():
            try:
                row = plain_json(line)
            except FormatError:
                continue
            if (
                isinstance(row, dict)
                and set(row) == set(COLUMNS)
                and not any(isinstance(one, (dict, list)) for one in row.values())
            ):
                yield row

    def add(self, row: Row) -> None:
        """Append a row.

        Raises:
            EdgeKVError: it cannot be written.
        """
        line = memoryview(json.dumps(row).encode() + b"\n")
        try:
            while line:
                line = line[os.write(self._handle, line) :]
        except OSError as error:
            raise EdgeKVError(
                f"cannot write {self.path}: {error.strerror}; make room there and give the command again: what is done is kept"
            ) from error

    def remove(self) -> None:
        """Remove it: its rows are in the table."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if os.fstat(self._handle).st_size == 0:
            self.remove()
        os.close(self._handle)


def _open(path: Path) -> int:
    """Open a file for appending and lock it.

    Raises:
        BlockingIOError: another process has it. OSError: it cannot be opened.
    """
    while True:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            _lock(handle)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except FileNotFoundError:
            pass
        except OSError:
            os.close(handle)
            raise
        os.close(handle)  # the sweep that had it ended meanwhile, and removed it


def _lock(handle: int) -> None:
    if sys.platform != "win32":
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # this file system has no locks
            pass
