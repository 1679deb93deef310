"""Runs many command lines one after the other in this process: JSON lists of arguments on stdin, JSON objects into the
file that is named, a line each."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from edgekv.cli.main import run_command_line

#: Seconds that no command line of these tests may take.
PATIENCE_S = 60


class Stuck(BaseException):
    """A command took too long."""


def _stuck(number: int, frame: FrameType | None) -> None:
    raise Stuck


def main() -> None:
    signal.signal(signal.SIGALRM, _stuck)
    lines = sys.stdin
    for line in lines:
        out, err = io.StringIO(), io.StringIO()
        sys.stdin = io.TextIOWrapper(io.BytesIO(b"It was\n"), encoding="utf-8")
        started = time.perf_counter()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            signal.alarm(PATIENCE_S)
            try:
                code = run_command_line(json.loads(line))
            except Stuck:
                code = -1
            signal.alarm(0)
        seconds = time.perf_counter() - started
        answer = {"code": code, "stdout": out.getvalue()[-2000:], "stderr": err.getvalue()[-4000:], "seconds": seconds}
        with Path(sys.argv[1]).open("a", encoding="utf-8") as answers:
            answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
