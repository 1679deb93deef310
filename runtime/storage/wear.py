"""The wear ledger: how many bytes each run has written to flash on each day, in a small file beside the store.

JSON lines of 128 bytes, one per run and day. A run appends its line at its first write of the day and then updates it in place,
under a lock, so that several processes share a ledger, a kill loses nothing, and a line lies in one sector. What is
counted is counted before it is written: after a crash or a failed write the ledger may say too much, never too little.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from edgekv.errors import FormatError, StoreError, UsageError, WriteLimit
from edgekv.files import open_file
from edgekv.schema import Bytes, Natural, from_json
from edgekv.sizes import format_bytes
from edgekv.spec import round_up

if sys.platform != "win32":
    import fcntl

LEDGER = "wear.jsonl"
LINE_BYTES = 128
_FEWER_PAGES = "raise --kv-budget, lower --context, or let pages be forgotten with --allow-drop"


@dataclass(frozen=True)
class Entry:
    """What one run wrote on one day (UTC); ``batches`` are the writes that the store was asked for."""

    day: str
    run: str
    bytes_written: int
    batches: int


@dataclass(frozen=True)
class Line:
    """An entry as its line in the ledger holds it."""

    day: Annotated[str, Meta(description="in UTC: YYYY-MM-DD")]
    run: Annotated[str, Meta(description="names the run: 12 hexadecimal digits")]
    bytes: Annotated[Bytes, Meta(description="that it wrote on that day, headers and padding included")]
    batches: Annotated[Natural, Meta(description="in how many writes")]

    def __post_init__(self) -> None:
        if date.fromisoformat(self.day).isoformat() != self.day:
            raise FormatError("day is written differently")


@dataclass(frozen=True)
class DayOfWear:
    """What all runs wrote on one day (UTC)."""

    day: str
    runs: int
    bytes_written: int
    batches: int


class WearLedger:
    """The ledger of a folder, as one run writes it.

    Args:
        max_bytes_per_day: of all runs that share the ledger; None is no limit.
        when_used_up: what the user can do beyond it, other than raising it.

    Raises (from the constructor):
        StoreError: the file cannot be opened.
    """

    def __init__(self, folder: Path, max_bytes_per_day: int | None = None, when_used_up: str = _FEWER_PAGES) -> None:
        self.path = folder / LEDGER
        self._limit = max_bytes_per_day
        self._when_used_up = when_used_up
        self._run = secrets.token_hex(6)
        self._entry: Entry | None = None
        self._place = 0
        try:
            self._file = open_file(self.path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise StoreError(
                f"cannot write the wear ledger {self.path}: {error.strerror}; without it nothing may be written there"
            ) from error

    def reserve(self, size_bytes: int) -> None:
        """Count a batch that is about to be written.

        Raises:
            WriteLimit: it would pass the limit of the day, or lines are damaged that may be of the day; nothing was counted.
            OSError: the ledger cannot be written.
        """
        day = today().isoformat()
        with self._locked():
            if self._limit is not None:
                used = self._written_on(day)
                if used + size_bytes > self._limit:
                    raise WriteLimit(
                        f"{self.path.parent} has taken {format_bytes(used)} today, and the next {format_bytes(size_bytes)} would"
                        f" pass --max-write-per-day {format_bytes(self._limit)}: raise that limit, {self._when_used_up}"
                    )
            entry = self._entry
            if entry is None or entry.day != day:
                entry = Entry(day, self._run, 0, 0)
                self._place = round_up(os.fstat(self._file).st_size, LINE_BYTES)
            self._entry = Entry(day, self._run, entry.bytes_written + size_bytes, entry.batches + 1)
            os.pwrite(self._file, _line(self._entry), self._place)

    def close(self) -> None:
        """Close the file; the ledger stays."""
        os.close(self._file)

    def __enter__(self) -> WearLedger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _written_on(self, day: str) -> int:
        status = os.fstat(self._file)
        data = os.pread(self._file, status.st_size, 0)
        # Lines are in the order of their days, so a damaged one with a line of an earlier day behind it is none of this day's.
        lines = _lines(data)
        behind = max((at for at, entry in enumerate(lines, 1) if entry is not None and entry.day < day), default=0)
        lost = lines[behind:].count(None)
        changed = datetime.fromtimestamp(status.st_mtime, timezone.utc).date().isoformat()
        if lost and changed >= day:
            raise WriteLimit(
                f"{lost} damaged lines of the wear ledger {self.path} may be of today, and --max-write-per-day not be kept:"
                " run without that limit, or delete the ledger to count from nothing"
            )
        if lost:  # a line of that day behind them says it to runs to come
            os.pwrite(self._file, _line(Entry(changed, self._run, 0, 0)), round_up(status.st_size, LINE_BYTES))
        return sum(entry.bytes_written for entry in lines if entry is not None and entry.day == day)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if sys.platform == "win32":
            yield
            return
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)


def today() -> date:
    """Return the date in UTC, by which days are counted."""
    return datetime.now(timezone.utc).date()


def read_ledger(path: Path) -> tuple[list[Entry], int]:
    """Read a ledger, or that of a folder; returns its entries and how many lines are damaged and do not count.

    Raises:
        UsageError: there is none.
    """
    file = path / LEDGER if path.is_dir() else path
    try:
        with os.fdopen(open_file(file, os.O_RDONLY), "rb") as stream:
            lines = _lines(stream.read())
    except OSError as error:
        raise UsageError(
            f"no wear ledger {file} ({error.strerror}); runs with --offload {path} make one when they write pages"
        ) from error
    return [entry for entry in lines if entry is not None], lines.count(None)


def by_day(entries: list[Entry]) -> list[DayOfWear]:
    """Sum entries by day, the oldest first."""
    days = sorted({entry.day for entry in entries})
    groups = [[entry for entry in entries if entry.day == day] for day in days]
    return [
        DayOfWear(day, len(group), sum(entry.bytes_written for entry in group), sum(entry.batches for entry in group))
        for day, group in zip(days, groups, strict=True)
    ]


def bytes_per_day(days: list[DayOfWear]) -> float:
    """Return the mean over all calendar days from the first one in the ledger to today."""
    if not days:
        return 0.0
    span = max((today() - date.fromisoformat(days[0].day)).days + 1, len(days))
    return sum(day.bytes_written for day in days) / span


def _line(entry: Entry) -> bytes:
    fields = {"day": entry.day, "run": entry.run, "bytes": entry.bytes_written, "batches": entry.batches}
    return json.dumps(fields).encode().ljust(LINE_BYTES - 1) + b"\n"


def _lines(data: bytes) -> list[Entry | None]:
    """Return what each line says; None: it is damaged."""
    return [_entry(data[start : start + LINE_BYTES]) for start in range(0, len(data), LINE_BYTES)]


def _entry(text: bytes) -> Entry | None:
    try:
        line = from_json(text, Line)
    except FormatError:
        return None
    return Entry(line.day, line.run, line.bytes, line.batches)
