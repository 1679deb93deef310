"""The rows of a sweep as a file, CSV or Parquet by its ending."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekv.errors import EngineMissing, UsageError

#: Columns that are no text, and how they are read back.
_TYPES: dict[str, type] = {
    "context": int, "max_tokens": int, "seed": int, "peak_bytes": int, "kills": int, "bytes_read": int, "bytes_written": int,
    "ttft_s": float, "decode_tokens_per_s": float, "decode_p99_s": float, "hit_rate": float, "wear_share": float,
    "seconds": float, "speed_left": float,
}  # fmt: skip


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a sweep that is done; none if there is no such file.

    Raises:
        UsageError: it is no table of a sweep, or of another kind than CSV and Parquet. EngineMissing: no pyarrow for Parquet.
    """
    kind = _kind(path)
    if not path.exists():
        return []
    try:
        if kind == ".parquet":
            rows: list[dict[str, Any]] = _parquet().read_table(path).to_pylist()
        else:
            with path.open(newline="", encoding="utf-8") as stream:
                rows = [{name: _typed(name, text) for name, text in row.items()} for row in csv.DictReader(stream)]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a table of a sweep ({error}); choose another --out") from error
    if any("key" not in row for row in rows):
        raise UsageError(f"{path} is not a table of a sweep; choose another --out")
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows, atomically.

    Raises:
        UsageError: the file cannot be written.
    """
    kind, temporary = _kind(path), path.with_name(path.name + ".tmp")
    try:
        if kind == ".parquet":
            import pyarrow as pa

            fields = [(name, _ARROW[_TYPES.get(name, str)](pa)) for name in rows[0]]
            _parquet().write_table(pa.Table.from_pylist(list(rows), schema=pa.schema(fields)), temporary)
        else:
            with temporary.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; choose another --out") from error


_ARROW: dict[type, Any] = {int: lambda pa: pa.int64(), float: lambda pa: pa.float64(), str: lambda pa: pa.string()}


def _kind(path: Path) -> str:
    if path.suffix not in (".csv", ".parquet"):
        raise UsageError(f"--out {path} must end in .csv or .parquet")
    return path.suffix


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
