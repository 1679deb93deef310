"""Text that commands read and write: files and stdin, in UTF-8, and one line when it cannot be done."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from edgekv.errors import EdgeKVError, UsageError


def read_text(path: Path, option: str) -> str:
    """Read a file, or stdin where the path is ``-``.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    if str(path) == "-":
        return read_stdin()
    try:
        return _decoded(path.read_bytes(), f"{option} {path}")
    except OSError as error:
        raise UsageError(f"cannot read {option} {path}: {error.strerror}") from error


def read_stdin() -> str:
    """Read all of stdin.

    Raises:
        UsageError: it is closed, cannot be read, or is not UTF-8.
    """
    if sys.stdin is None:
        raise UsageError("stdin is closed; give a file instead, or end the command with: < FILE")
    try:
        return _decoded(sys.stdin.buffer.read(), "stdin")
    except OSError as error:
        raise UsageError(f"cannot read stdin: {error.strerror}") from error


def read_line() -> str | None:
    """Read one line of stdin, without its end; None at its end.

    Raises:
        UsageError: it is closed, cannot be read, or the line is not UTF-8; the next one can be read.
    """
    if sys.stdin is None:
        raise UsageError("stdin is closed; a conversation is read from it")
    try:
        line = sys.stdin.buffer.readline()
    except OSError as error:
        raise UsageError(f"cannot read stdin: {error.strerror}") from error
    return _decoded(line, "this line of stdin").rstrip("\r\n") if line else None


def write_text(path: Path, text: str, option: str) -> None:
    """Write a file.

    Raises:
        EdgeKVError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EdgeKVError(f"cannot write {path}: {error.strerror}; give {option} another path") from error


def check_writable(path: Path, option: str) -> None:
    """Say now, not after minutes, that a file cannot be written.

    Raises:
        UsageError: it cannot.
    """
    if path.exists():
        reason = "it is a folder" if path.is_dir() else None if os.access(path, os.W_OK) else "it may not be written"
    else:
        try:
            with tempfile.TemporaryFile(dir=path.parent):  # some folders (/proc) do not say that they take no file
                reason = None
        except OSError as error:
            reason = f"{path.parent} is no folder that can be written to ({error.strerror})"
    if reason is not None:
        raise UsageError(f"cannot write {option} {path}: {reason}")


def _decoded(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read {what}: it is not UTF-8 text ({error.reason} at byte {error.start})") from error
