"""Runs a command many times, and interrupts each at a random moment: the program of test_interrupt.py.

`python -m tests.cli.interrupted BUNDLE FOLDER COUNT SEED`: every run is a process of its own, forked from this one, which has all
imports behind it. A run that was interrupted must exit with 130, within a second of its own work, in one line; and what it
printed, with what the session goes on with, must be the text of a run that nobody interrupted. Prints what it found as JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import edgekv.__main__
import edgekv.cli.main
import edgekv.runtime.engines.onnx.options
import edgekv.runtime.generate
from edgekv.cli.interrupt import Signals

TOKENS = 60
PROMPT_CHARACTERS = 2600
#: Of waiting for a process, before the run counts as hung.
HUNG_S = 60.0


class Watching(Signals):
    """The signals of a run, which are held back until it watches them: what starts Python is not what is tested."""

    def watch(self) -> None:
        super().watch()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@dataclass(frozen=True)
class Moment:
    """When a signal is sent: once the main thread has used so many seconds of a processor and so many bytes were said."""

    seconds: float
    said: int


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    ``before``: its text when the signal came; None: the moment did not come before the end. ``silent``: seconds of a processor
    that its main thread used before it spoke. ``seconds``: of a processor that all its threads used from the signal to the end.
    """

    code: int
    before: str | None
    text: str
    errors: str
    silent: float
    seconds: float


def run(folder: Path, arguments: list[str], moment: Moment | None = None) -> Ended:
    """Be the parent of a run, and interrupt it at a moment."""
    out, errors = folder / "out.txt", folder / "err.txt"
    out.write_text("")
    child = os.fork()
    if child == 0:
        edgekv.__main__.Signals = Watching  # type: ignore[attr-defined]
        for path, descriptor in ((out, 1), (errors, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv = ["edgekv", *arguments]
        code: object = 0
        try:
            edgekv.__main__.main()
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 0)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = main_thread_seconds(child)
    text: str | None = None
    used, silent = 0.0, 0.0
    deadline = time.monotonic() + HUNG_S
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        lasted, said = main_thread_seconds(child) - began, out.stat().st_size
        if not said:
            silent = lasted
        if moment is not None and lasted >= moment.seconds and said >= moment.said:
            os.kill(child, signal.SIGSTOP)
            text, used = out.read_text(), cpu_seconds(child)
            os.kill(child, signal.SIGINT)
            os.kill(child, signal.SIGCONT)
            moment = None
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.0005)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime - used
    return Ended(os.waitstatus_to_exitcode(ended[1]), text, out.read_text(), errors.read_text(), silent, seconds)


def main_thread_seconds(process: int) -> float:
    """Return the processor time of the main thread of a process: a clock that does not run while others have the processor."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e9


def cpu_seconds(process: int) -> float:
    """Return the processor time of all threads of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def check(bundle: str, folder: Path, count: int, seed: int) -> dict[str, object]:
    """Interrupt runs, and return what was seen of them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a shell, even where this runs in the background
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    prompt = folder / "prompt.txt"
    text = Path(__file__).resolve().parents[2] / "examples" / "long_prompt.txt"
    prompt.write_text(text.read_text()[:PROMPT_CHARACTERS])
    session = folder / "story.kv"
    common = [
        "run",
        bundle,
        "--session",
        str(session),
        "--quiet",
        "--kv-budget",
        "60%",
        "--context",
        "1400",
        "--threads",
        "2",
    ]
    begin = [*common, "-f", str(prompt), "-n", str(TOKENS)]
    whole = run(folder, begin)
    assert whole.code == 0, whole.errors
    chance = random.Random(seed)
    faults, codes, said = [], [0, 0], [0, 0]
    for index in range(count):
        shutil.rmtree(session, ignore_errors=True)
        in_prompt = Moment(chance.uniform(0, whole.silent), 0)
        ended = run(folder, begin, in_prompt if index % 2 else Moment(0, chance.randrange(1, len(whole.text))))
        codes[ended.code == 130] += 1
        if ended.before is None or (ended.code == 0 and ended.before.strip() == whole.text.strip()):
            continue  # no signal was sent, or all was said before it came
        printed = ended.text.removesuffix("\n")
        said[bool(printed)] += 1
        again = [*common, "--continue", "-n", str(TOKENS)]
        resumed = run(folder, again) if session.exists() else run(folder, begin)
        if "is empty: give it a --prompt" in resumed.errors:
            resumed = run(folder, begin)
        goes_on = printed + resumed.text.removesuffix("\n")
        fine = (
            ended.code == 130
            and ended.errors.count("\n") == 1
            and ended.errors.startswith("edgekv: interrupted")
            and ended.seconds < 1.0
            and resumed.code == 0
            and (goes_on.startswith(whole.text.removesuffix("\n")))
        )
        if not fine:
            faults.append({"run": index, "ended": repr(ended), "resumed": repr(resumed)})
    return {"finished": codes[0], "interrupted": codes[1], "silent": said[0], "spoke": said[1], "faults": faults}


if __name__ == "__main__":
    print(json.dumps(check(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
