"""Commands as processes of their own, to be killed: forked from a server that has all imports behind it and no threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

#: Of waiting for a process, before it counts as hung.
HUNG_S = 180.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "edgekv.cli.main",
        "edgekv.cli.run",
        "edgekv.runtime.add_prefix",
        "edgekv.runtime.engines.onnx.options",
        "tests.soak.children",
    ]
)


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, minus the number of a signal; what it said."""

    code: int
    text: str
    errors: str


class Child:
    """A command, `edgekv ARGUMENTS`, that runs."""

    def __init__(self, name: Path, arguments: list[str]) -> None:
        self._out, self._errors = name.with_suffix(".out"), name.with_suffix(".err")
        self._process = _context.Process(target=_be, args=(self._out, self._errors, arguments))
        self._process.start()
        while self._process.is_alive() and not self._errors.exists():
            time.sleep(0.001)  # until then a signal would meet a process that is not yet edgekv's

    def wait(self, seconds: float, said: int) -> bool:
        """Wait until the process has lasted so long and said so many characters; False: it ended before."""
        began = time.monotonic()
        while self._process.is_alive():
            lasted = time.monotonic() - began
            if lasted >= seconds and (self._out.stat().st_size >= said or lasted > HUNG_S):
                return True
            time.sleep(0.001)
        return False

    def kill(self, number: signal.Signals) -> None:
        """Send a signal."""
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def end(self) -> Ended:
        """Wait for its end.

        Raises:
            AssertionError: it does not end.
        """
        self._process.join(HUNG_S)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
        self._process.close()
        ended = Ended(code if code is not None else 0, self._out.read_text(), self._errors.read_text())
        for path in (self._out, self._errors):
            path.unlink()
        assert code is not None, f"the command did not end within {HUNG_S} s; it said {ended.errors!r}"
        return ended


def _be(out: Path, errors: Path, arguments: list[str]) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # as in a shell, wherever this runs
    for path, descriptor in ((out, 1), (errors, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["edgekv", *arguments]
    from edgekv.__main__ import main

    main()
