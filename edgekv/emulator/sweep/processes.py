"""Cases on processes of this machine. They speak over pipes, which nobody else can reach, and never outlive the sweep."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path
from threading import Thread

from edgekv.errors import EdgeKVError
from edgekv.scratch import remove_abandoned

from ..play.shape_app import Shape
from .case import Case, Row, run_case


def rows_here(shape: Shape, cases: Sequence[Case], workers: int) -> Generator[Row, None, None]:
    """Run cases and yield their rows as they come. When the iterator ends or is closed, the processes are killed.

    Raises:
        EdgeKVError: a process was killed, or has no room for its case.
    """
    left = iter(cases)
    pool: list[_Worker] = []
    try:
        for case in itertools.islice(left, workers):
            pool.append(_Worker(shape))
            pool[-1].give(case)
        busy = pool.copy()
        while busy:
            ready = wait([worker.rows for worker in busy])
            for worker in [worker for worker in busy if worker.rows in ready]:
                row = worker.take()
                following = next(left, None)
                if following is None:
                    busy.remove(worker)
                else:
                    worker.give(following)
                yield row
    finally:
        for worker in pool:
            worker.process.kill()
        for worker in pool:
            worker.process.join()
        remove_abandoned(Path(tempfile.gettempdir()), "edgekv-")  # what the killed ones were at


class _Worker:
    """A process, and the ends of its two pipes."""

    def __init__(self, shape: Shape) -> None:
        context = multiprocessing.get_context("spawn")
        cases, self.cases = context.Pipe(duplex=False)
        self.rows, rows = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(shape, cases, rows), daemon=True)
        with _blocked():
            self.process.start()
        cases.close()
        rows.close()  # the worker has the only one: it is closed when the worker is gone

    def give(self, case: Case) -> None:
        with suppress(BrokenPipeError):  # take() says so
            self.cases.send(case)

    def take(self) -> Row:
        try:
            answer: Row | EdgeKVError = self.rows.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            code = self.process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            raise EdgeKVError(
                f"a process of the sweep {how}; give the command again, with fewer --workers if memory was short: what is"
                " done is kept"
            ) from error
        if isinstance(answer, EdgeKVError):
            raise answer
        return answer


@contextmanager
def _blocked() -> Iterator[None]:
    """Let the processes that are started here inherit blocked signals: those that a terminal sends to all are for this process.

    The tracker that multiprocessing starts with the first of them would unblock them, so it is started before.
    """
    ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(shape: Shape, cases: Connection, rows: Connection) -> None:
    """Be a worker."""
    Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError):  # the sweep is gone
        while True:
            case = cases.recv()
            try:
                answer: Row | EdgeKVError = run_case(shape, case)
            except EdgeKVError as error:
                answer = error
            rows.send(answer)


def _end_with_parent() -> None:
    """End in the middle of a case when the sweep was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
