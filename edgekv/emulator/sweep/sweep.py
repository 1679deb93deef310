"""Many weightless runs at once, on dask: every combination of profiles, contexts, policies, budgets; resumed where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edgekv
from edgekv.device_profiles import load
from edgekv.errors import EdgeKVError, EngineMissing, FormatError, UsageError
from edgekv.schema import plain_json
from edgekv.settings import ATTEND, KV_BUDGET, POLICY, Setting

from ..device import Device
from ..play.play import emulate_shape
from ..play.scenario import AppSettings, Scenario, Turn
from ..play.shape_app import Shape

if TYPE_CHECKING:
    from distributed import Client

Row = dict[str, Any]

#: What is reported of a case, after the fields of :class:`Case`. ``error`` says why a case cannot run or ended early.
OUTCOME = (
    "error", "ttft_s", "decode_tokens_per_s", "decode_p99_s", "hit_rate", "peak_bytes", "kills", "bytes_read", "bytes_written",
    "wear_share", "seconds", "speed_left",
)  # fmt: skip


#: Seconds for a scheduler to answer and to have a worker.
ANSWER_S = 10.0


@dataclass(frozen=True)
class Case:
    """One run: a prompt that fills ``context`` but for ``max_tokens``, and an answer of so many."""

    profile: str
    context: int
    policy: str
    kv_budget: str
    attend: str
    max_tokens: int
    seed: int

    def key(self, shape: Shape) -> str:
        """Return what tells this case of this model from every other, in this version of edgekv."""
        facts = json.dumps([dataclasses.asdict(self), dataclasses.asdict(shape), edgekv.__version__], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


def all_cases(
    profiles: Sequence[str],
    contexts: Sequence[int],
    policies: Sequence[str],
    budgets: Sequence[str],
    attends: Sequence[str],
    *,
    max_tokens: int,
    seed: int,
) -> list[Case]:
    """Return every combination.

    Raises:
        UsageError: a context leaves no room for a prompt, or a policy, budget or share of pages is none.
        ProfileError: there is no such profile.
    """
    for profile in profiles:
        load(profile)
    choices: list[tuple[Sequence[str], Setting[Any]]] = [
        (policies, POLICY), (attends, ATTEND), ([budget for budget in budgets if budget != "device"], KV_BUDGET),
    ]  # fmt: skip
    for words, setting in choices:
        for word in words:
            setting.read(word)
    if min(contexts) <= max_tokens:
        raise UsageError(f"a context of {min(contexts)} leaves no prompt beside {max_tokens} tokens to generate")
    combined = itertools.product(profiles, contexts, policies, budgets, attends)
    cases = [Case(*values, max_tokens=max_tokens, seed=seed) for values in combined]
    return list(dict.fromkeys(cases))  # what is named twice is run once


def run_case(shape: Shape, case: Case) -> Row:
    """Run one case and return its row; a case that is impossible, or fails, has an ``error`` and no numbers."""
    row: Row = {"key": case.key(shape), **dataclasses.asdict(case), **dict.fromkeys(OUTCOME)}
    app = AppSettings(
        kv_budget=None if case.kv_budget == "device" else case.kv_budget,
        context=case.context,
        policy=case.policy,
        attend=case.attend,
    )
    turn = Turn(prompt_tokens=case.context - case.max_tokens, max_tokens=case.max_tokens)
    try:
        result = emulate_shape(shape, Device(case.profile, seed=case.seed), Scenario((turn,), app=app), seed=case.seed)
    except EdgeKVError as error:
        return {**row, "error": str(error)}
    except Exception as error:  # a fault of ours in one case is in its row: the others go on
        return {**row, "error": f"{type(error).__name__}: {error}"}
    numbers = {name: result.totals[name] for name in OUTCOME if name in result.totals}
    return {**row, **numbers, "error": result.turns[0].error, "ttft_s": result.turns[0].ttft_s}


def sweep(
    shape: Shape,
    cases: Sequence[Case],
    out: Path,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Run the cases that ``out`` and its journal do not hold yet; returns the rows of all, in the order of the cases.

    Each case is in the journal (``OUT.partial``) as soon as it is done, so that an interrupted sweep goes on where it was. At the
    end the rows are written to ``out``, atomically, behind those of other sweeps that it held, and the journal goes.

    Args:
        out: ``.csv`` or ``.parquet``. scheduler: address of a dask scheduler; None: ``workers`` processes here.

    Raises:
        UsageError: ``out`` is of another kind or cannot be written. EngineMissing: edgekv[sweep] is not installed.
    """
    from .table import read_rows, write_rows

    journal = out.with_name(out.name + ".partial")
    done = {row["key"]: row for row in [*read_rows(out), *_read_journal(journal)]}
    keys = [case.key(shape) for case in cases]
    missing = [case for case, key in zip(cases, keys, strict=True) if key not in done]
    count = len(cases) - len(missing)
    progress(count, len(cases))
    if missing:
        try:
            stream = journal.open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {journal}: {error.strerror}; choose another --out") from error
        with stream, _client(scheduler, min(workers or os.cpu_count() or 1, len(missing))) as client:
            for row in _results(client, shape, missing):
                done[row["key"]] = row
                stream.write(json.dumps(row) + "\n")
                stream.flush()
                count += 1
                progress(count, len(cases))
    rows = [done[key] for key in keys]
    wanted = set(keys)
    write_rows(out, [*(row for key, row in done.items() if key not in wanted), *rows])
    journal.unlink(missing_ok=True)
    return rows


def _read_journal(path: Path) -> Iterator[Row]:
    """Read the rows of a journal that are whole; the others are computed again."""
    if not path.exists():
        return
    columns = {"key", *(field.name for field in dataclasses.fields(Case)), *OUTCOME}
    for line in path.read_bytes().splitlines():
        try:
            row = plain_json(line)
        except FormatError:
            continue
        if (
            isinstance(row, dict)
            and set(row) == columns
            and not any(isinstance(one, (dict, list)) for one in row.values())
        ):
            yield row


def _results(client: Client, shape: Shape, cases: Sequence[Case]) -> Iterator[Row]:
    from distributed import as_completed

    futures = [client.submit(run_case, shape, case, pure=False) for case in cases]
    for future in as_completed(futures):
        yield future.result()


@contextmanager
def _client(scheduler: str | None, workers: int) -> Iterator[Client]:
    try:
        from distributed import Client, LocalCluster
        from distributed import TimeoutError as NoWorker
    except ImportError as error:
        raise EngineMissing("sweeps need dask: pip install 'edgekv[sweep]'") from error
    if scheduler is not None:
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
        return
    # Ctrl-C goes to every process of a terminal. It is for this one: the others inherit that it is blocked (by the thread that
    # starts them, unless it starts the tracker first, which unblocks it).
    ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address=None,
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # its port: two sweeps would tell of 8787 otherwise
            silence_logs=50,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    with cluster, Client(cluster) as client:
        yield client
