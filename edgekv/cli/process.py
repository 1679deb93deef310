"""The process around a command: its streams when it begins, its exit code and its one line of error when it ends."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import platform
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import TextIO

import typer

import edgekv
from edgekv.errors import EdgeKVError

from .interrupt import Interrupted

#: Every code that a command may end with; docs/cli.md says the same.
EXIT_CODES = {
    0: "it is done",
    1: "it failed while running: the medium, the network, memory, a gate that was not passed",
    2: "it cannot be done as asked: an option, a file, a model; nothing was changed",
    3: "the device gives other tokens than this machine (`edgekv deploy`)",
    70: "a fault of edgekv; the line names a file with the traceback",
    128 + signal.SIGHUP: "the terminal was closed (SIGHUP)",
    128 + signal.SIGINT: "Ctrl-C (SIGINT)",
    128 + signal.SIGPIPE: "the reader of the output is gone, as with `| head`",
    128 + signal.SIGTERM: "SIGTERM",
}
FAULT = 70

#: What typer raises for a command line that it cannot read (a class of click, or of its own copy of it).
_CannotRead: type[Exception] = typer.BadParameter.__mro__[1]


class Output(io.TextIOWrapper):
    """A stream that prints every character, if need be as its code, and remembers why it took no more."""

    refused: OSError | None = None

    def write(self, text: str, /) -> int:
        """Write as :meth:`io.TextIOWrapper.write` does."""
        with self._remembering():
            return super().write(text)

    def flush(self) -> None:
        """Flush as :meth:`io.TextIOWrapper.flush` does."""
        with self._remembering():
            super().flush()

    @contextlib.contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.refused = error
            raise


def open_streams() -> None:
    """Make the standard streams safe to write to.

    A closed descriptor would be given to the next file that is opened, which would then receive the output. A closed stdin
    stays None; a closed stdout refuses what is written to it.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)
    sys.stdout, sys.stderr = _output(1, sys.stdout), _output(2, sys.stderr)


def _output(number: int, stream: TextIO | None) -> TextIO:
    encoding = stream.encoding if stream is not None else "utf-8"
    raw = open(number, "wb", closefd=False)  # noqa: SIM115 - it lives as long as the process
    return Output(raw, encoding=encoding, errors="backslashreplace", line_buffering=number == 2 or os.isatty(number))


def exit_code(command: Callable[[], object]) -> int:
    """Call a command and return the exit code of its process; every way to end prints one line on stderr at the most."""
    code, line = _ending(command)
    refused = _output_refused()
    if isinstance(refused, BrokenPipeError):
        code, line = 128 + signal.SIGPIPE, None
    elif refused is not None and code == 0:
        code, line = 1, f"cannot write the output: {refused.strerror}"
    if line is not None:
        with contextlib.suppress(OSError):  # nobody listens: the code says it
            print(f"edgekv: {' '.join(line.split())}", file=sys.stderr, flush=True)
    if refused is not None:  # what is still in a buffer would be tried again at the end of the process
        for stream in (sys.stdout, sys.stderr):
            if getattr(stream, "refused", None) is not None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _ending(command: Callable[[], object]) -> tuple[int, str | None]:
    try:
        command()
        return 0, None
    except typer.Exit as end:
        return end.exit_code, None
    except Interrupted as end:
        return 128 + end.number, str(end)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # rich ends the process so
            return 128 + signal.SIGPIPE, None
        return (end.code, None) if isinstance(end.code, int) else (int(end.code is not None), None)
    except EdgeKVError as error:
        return error.exit_code, str(error)
    except _CannotRead as error:
        return 2, _explained(error)
    except (KeyboardInterrupt, typer.Abort):
        return 128 + signal.SIGINT, "interrupted"
    except MemoryError:
        return 1, _NO_MEMORY
    except OSError as error:
        if error.errno == errno.ENOMEM:
            return 1, _NO_MEMORY
        if _output_refused() is not None:
            return 0, None  # the caller says why
        if error.filename is not None:
            return 1, f"cannot use {os.fspath(error.filename)!r}: {error.strerror}"
        return FAULT, _reported(error)
    except Exception as error:
        return FAULT, _reported(error)


_NO_MEMORY = "the system gives this process no more memory; lower --kv-budget or --context"


def _explained(error: Exception) -> str:
    """Return what was wrong with a command line, and where its help is."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "edgekv"
    if type(error).__name__ == "NoArgsIsHelpError":
        return f"give a command; {path} --help lists them"
    message = " ".join(str(getattr(error, "format_message", error.__str__)()).split()).rstrip(".")
    if not message[:2].isupper():  # the name of an argument stays as it is written
        message = f"{message[:1].lower()}{message[1:]}"
    return f"{message}; see {path} --help"


def _output_refused() -> OSError | None:
    """Return why stdout or stderr takes no more, if one of them does not."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
        refused = getattr(stream, "refused", None)
        if refused is not None:
            return refused  # type: ignore[no-any-return]
    return None


def _reported(error: Exception) -> str:
    """Write a traceback to a file, and return a line that names both."""
    what = f"{type(error).__name__}: {error}".split("\n", 1)[0]
    text = "".join(traceback.format_exception(error))
    facts = f"edgekv {edgekv.__version__}, Python {platform.python_version()}, {platform.platform()}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="edgekv-fault-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"{facts}\n\n{text}")
        return f"a fault of edgekv, {what}; the traceback is in {file.name}, please report it"
    except OSError as full:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"a fault of edgekv, {what} ({os.path.basename(place.filename)}:{place.lineno}; the traceback could not be"
            f" written: {full.strerror}), please report it"
        )
