"""The rows of a sweep as a file, CSV or Parquet by its ending."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekv.errors import EdgeKVError, EngineMissing, UsageError

from .case import COLUMNS, MODEL, Row

#: Columns that are no text, and how they are read back.
_TYPES: dict[str, type] = {
    "page_size": int, "context": int, "max_tokens": int, "seed": int, "peak_bytes": int, "kills": int, "bytes_read": int,
    "bytes_written": int, "ttft_s": float, "decode_tokens_per_s": float, "decode_p99_s": float, "hit_rate": float,
    "wear_share": float, "seconds": float, "speed_left": float,
}  # fmt: skip


def check_kind(path: Path) -> None:
    """Say before any work that a table of this kind cannot be written.

    Raises:
        UsageError: it is neither CSV nor Parquet. EngineMissing: no pyarrow for Parquet.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise UsageError(f"--out {path} must end in .csv or .parquet")
    if path.suffix == ".parquet":
        _parquet()


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a sweep that is done; none if there is no such file, or nothing in it.

    Raises:
        UsageError: it is no table of a sweep, or of another kind than CSV and Parquet. EngineMissing: no pyarrow for Parquet.
    """
    check_kind(path)
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return []
    try:
        rows = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    except UsageError:
        raise
    except (OSError, ValueError, NotImplementedError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as a table of a sweep ({error}); choose another --out") from error
    if not all(row["key"] for row in rows):
        raise UsageError(f"{path} is not a table of a sweep: it has rows without a key; choose another --out")
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows, atomically.

    Raises:
        EdgeKVError: the file cannot be written; what was there stays.
    """
    data = _parquet_bytes(rows) if path.suffix == ".parquet" else _csv_bytes(rows)
    temporary = path.with_name(path.name + ".tmp")
    try:
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise EdgeKVError(
            f"cannot write {path}: {error.strerror}; make room there and give the command again: what is done is kept"
        ) from error


def _check_columns(path: Path, names: Sequence[str]) -> None:
    """Refuse a table whose columns are not those of a sweep; that it does not say the model is how it was once.

    Raises:
        UsageError: they are others.
    """
    odd = [name for name in names if name not in COLUMNS or names.count(name) > 1]
    missing = [name for name in COLUMNS if name not in names and name not in MODEL]
    if odd or missing:
        what = f"its column {odd[0]!r} is none of a sweep's" if odd else f"it has no column {missing[0]!r}"
        raise UsageError(f"{path} is not a table of a sweep: {what}; choose another --out")


def _read_csv(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8-sig") as stream:  # a spreadsheet may have put a mark before it
        lines = csv.reader(stream, strict=True)
        names = next(lines, [])
        _check_columns(path, names)
        rows = []
        for line in filter(None, lines):
            if len(line) != len(names):
                raise ValueError(f"line {lines.line_num} has {len(line)} fields, not {len(names)}")
            texts = dict(zip(names, line, strict=True))
            rows.append({name: _typed(name, texts.get(name, "")) for name in COLUMNS})
    return rows


def _csv_bytes(rows: Sequence[Row]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def _read_parquet(path: Path) -> list[Row]:
    table = _parquet().read_table(path)
    _check_columns(path, table.column_names)
    kinds = {field.name: field.type for field in _schema()}
    columns = {name: table[name].cast(kinds[name]).to_pylist() for name in COLUMNS if name in table.column_names}
    nothing = [None] * table.num_rows
    return [
        dict(zip(COLUMNS, row, strict=True))
        for row in zip(*(columns.get(name, nothing) for name in COLUMNS), strict=True)
    ]


def _parquet_bytes(rows: Sequence[Row]) -> bytes:
    import pyarrow as pa

    stream = io.BytesIO()
    _parquet().write_table(pa.Table.from_pylist(list(rows), schema=_schema()), stream)
    return stream.getvalue()


def _schema() -> Any:
    import pyarrow as pa

    arrow = {int: pa.int64(), float: pa.float64(), str: pa.string()}
    return pa.schema([(name, arrow[_TYPES.get(name, str)]) for name in COLUMNS])


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise EngineMissing("Parquet needs pyarrow: pip install 'edgekv[sweep]', or write a .csv") from error
    return pyarrow.parquet


def _typed(name: str, text: str) -> Any:
    if not text:
        return None
    return _TYPES.get(name, str)(text)
