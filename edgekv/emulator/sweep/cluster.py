"""Cases on a dask cluster that the user names; dask is loaded for nothing else."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import edgekv
from edgekv.errors import EdgeKVError, EngineMissing, UsageError

from ..play.shape_app import Shape
from .case import Case, Row, run_case

if TYPE_CHECKING:
    from distributed import Client

#: Seconds for a scheduler to answer and to have a worker.
ANSWER_S = 10.0


def rows_there(shape: Shape, cases: Sequence[Case], scheduler: str) -> Generator[Row, None, None]:
    """Run cases on a cluster and yield their rows as they come.

    Raises:
        UsageError: no scheduler answers at this address, or it has no workers. EdgeKVError: the cluster fails.
        EngineMissing: edgekv[sweep] is not installed.
    """
    keys = {case.key(shape) for case in cases}
    with _client(scheduler) as client:
        from distributed import as_completed

        futures = [client.submit(run_case, shape, case, pure=False) for case in cases]
        for future in as_completed(futures):
            try:
                row: Row = future.result()
            except EdgeKVError:
                raise
            except Exception as error:  # a worker without edgekv, workers that were killed, a scheduler that is gone
                raise EdgeKVError(
                    f"the dask cluster at {scheduler} fails ({type(error).__name__}: {error}); give the command again when it"
                    " works: what is done is kept"
                ) from error
            if row["key"] not in keys:
                raise EdgeKVError(
                    f"the workers of {scheduler} have another edgekv than this one ({edgekv.__version__}); install the same"
                )
            yield row


@contextmanager
def _client(scheduler: str) -> Iterator[Client]:
    try:
        from distributed import Client
        from distributed import TimeoutError as NoWorker
    except ImportError as error:
        raise EngineMissing("--scheduler needs dask: pip install 'edgekv[sweep]'") from error
    try:
        client = Client(scheduler, timeout=ANSWER_S)
    except (OSError, ValueError) as error:
        raise UsageError(f"no dask scheduler answers at {scheduler}: {error}") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=ANSWER_S)
        except NoWorker as error:
            raise UsageError(
                f"the dask scheduler at {scheduler} has no workers; start some with: dask worker {scheduler}"
            ) from error
        yield client
