"""The object store below flash: pages as records in write-once objects, behind any URL that obstore understands.

Objects of a run are ``URL/edgekv-<started>-<host>-<pid>-<random>/<first record>.pages``: records as on flash
(:mod:`edgekv.runtime.storage.record`), side by side, 256 KiB and more in one object. An object is never changed; it is deleted
when its last page is freed, and all of them when the run ends. ``run.json`` beside them proves that the store can be written
before anything depends on it.

Requests are retried with growing pauses until the patience of the store ends; then one error says so. What came back is
checked like a record on flash: a store that lies or loses an object ends the run, it never changes a token.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import CorruptPage, StoreError
from edgekv.spec import PageSpec
from edgekv.tiers import Tier

from ..kernels.interface import Pool, RecordStreams
from .cipher import Cipher
from .interface import Landing, StoreCounters
from .objects import FIRST_PATIENCE_S, PATIENCE_S, RUN_PREFIX, first_line, open_objects
from .record import Wanted, neighbours, open_record, pack_record

Bytes = NDArray[np.uint8]
Result = TypeVar("Result")

#: Pages wait in RAM until an object is at least so large: object stores charge, and are slow, by the request.
PART_BYTES = 256 * 1024
#: An object is at most so large: below this, stores take it in one request.
OBJECT_BYTES = 4 * 1024 * 1024
#: Requests in flight for one read. Source: one S3 connection gives 80-100 MB/s at tens of ms per request; several add up.
REQUESTS = 8
#: How long a store that failed once is asked to take back what it has.
LAST_PATIENCE_S = 2.0
#: Records that lie closer together are read in one request: what is read for nothing takes less than a request more.
GAP_BYTES = 64 * 1024

_log = logging.getLogger("edgekv")


@dataclass
class _Object:
    """Records [first, first + count), of which ``live`` are not freed."""

    name: str
    first: int
    count: int
    live: int


class ObjectStore:
    """A :class:`~edgekv.runtime.storage.interface.PageStore` in an object store; its pages are REMOTE.

    Batches below ``PART_BYTES`` wait in RAM until so many are together, and are read from there.

    Args:
        cipher: encrypts the records. patience_s: how long the store may stay silent, retries included.

    Raises (from the constructor):
        StoreError: it cannot be written. UsageError, EngineMissing: see :func:`open_objects`.
    """

    def __init__(
        self, url: str, spec: PageSpec, *, cipher: Cipher | None = None, patience_s: float = PATIENCE_S
    ) -> None:
        self.url = url.rstrip("/")
        self.spec = spec
        self.counters = StoreCounters()
        self.freed = 0  # no number is given twice
        self._cipher = cipher
        self._patience_s = min(patience_s, FIRST_PATIENCE_S)
        self._store = open_objects(url, self._patience_s)
        self._objects: list[_Object] = []
        self._waiting: dict[int, Bytes] = {}
        self._freed: set[int] = set()
        self._next = 0
        self._lost = False
        started = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        self.run = f"{RUN_PREFIX}{started}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        facts = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": started,
            "record_bytes": spec.record_bytes,
        }
        self._put("run.json", json.dumps(facts).encode())
        self._patience_s = patience_s
        if not url.startswith("memory:"):
            self._store = open_objects(url, patience_s)
        self._threads = ThreadPoolExecutor(REQUESTS, thread_name_prefix="edgekv-remote")

    def write(self, tags: list[int], pages: list[Bytes]) -> list[int]:
        """Store pages as records of new objects, and return their numbers.

        Raises:
            StoreError: the store did not take them; none of the pages counts as stored, and the caller still has them.
        """
        records = list(range(self._next, self._next + len(pages)))
        block = np.zeros((len(pages), self.spec.record_bytes), np.uint8)
        for row, record, tag, page in zip(block, records, tags, pages, strict=True):
            pack_record(row, record, tag, page, self.spec.warm_bytes, self._cipher)
        waiting = {**self._waiting, **dict(zip(records, block, strict=True))}
        if len(waiting) * self.spec.record_bytes >= PART_BYTES:
            # Readers on other threads look at what waits first, then at the objects: never at neither.
            self._objects += self._write_objects(waiting)
            waiting = {}
        self._waiting = waiting
        self._next += len(pages)
        self.counters.records_written += len(pages)
        return records

    def _write_objects(self, waiting: dict[int, Bytes]) -> list[_Object]:
        written: list[_Object] = []
        records, rows = list(waiting), list(waiting.values())
        per_object = max(1, OBJECT_BYTES // self.spec.record_bytes)
        for start in range(0, len(rows), per_object):
            part, live = rows[start : start + per_object], records[start : start + per_object]
            # A name of its own for each attempt: one that timed out may still arrive.
            name = f"{records[start]:010d}-{secrets.token_hex(2)}.pages"
            try:
                self._put(name, np.concatenate(part))
            except StoreError:
                self._delete([f"{self.run}/{held.name}" for held in written])
                raise
            written.append(_Object(name, records[start], len(part), len(set(live) - self._freed)))
            self.counters.objects_written += 1
            self.counters.remote_bytes_written += len(part) * self.spec.record_bytes
        self._freed.clear()
        return written

    def read(self, records: list[int], tags: list[int], out: Bytes) -> None:
        """Read records into ``out`` [n, record_bytes] uint8, checked and decrypted; from any thread.

        Records of one object that lie close together come in one request; several requests are in flight. A record that fails
        its check is read once more, in case it was damaged on the way.

        Raises:
            CorruptPage: a record is not what was written; ``out`` must not be used.
            StoreError: the store did not answer, or lost an object.
        """
        self.start(Wanted(records, tags, self.spec.warm_bytes), out)(None)

    def start(self, wanted: Wanted, out: Bytes) -> Landing:
        """Start to read, on the store's threads; what is asked for counts as read from now on. See :class:`PageStore`."""
        records, tags = wanted.records, wanted.tags
        waiting, sought, spoilt = self._waiting, [], False
        for index, (record, tag) in enumerate(zip(records, tags, strict=True)):
            if record not in waiting:
                sought.append(index)
                continue
            out[index] = waiting[record]
            spoilt = spoilt or not open_record(out[index], record, tag, self.spec.warm_bytes, self._cipher)
        runs = self._runs(records, sought)
        reads = [self._threads.submit(self._read_run, *run, records, tags, out) for run in runs]
        self.counters.records_read += len(records)
        self.counters.remote_bytes_read += len(sought) * self.spec.record_bytes

        def land(pool: Pool | None) -> None:
            wait(reads)  # all of them, also when one fails: none may write into ``out`` after this
            for read in reads:
                read.result()
            if spoilt:
                raise CorruptPage(f"a page that waits for {self.url} changed in memory; it was not used")

        return land

    def walk(self, rows: Bytes, capacity: int, n_layers: int) -> RecordStreams | None:
        """None: the records are in no file."""
        return None

    def _runs(self, records: list[int], sought: list[int]) -> Iterator[tuple[_Object, int, int]]:
        """Cut what is sought, indices into records, into runs [start, stop) of one object each."""
        objects = self._objects
        firsts = [held.first for held in objects]
        place = {index: bisect_right(firsts, records[index]) - 1 for index in sought}
        start = 0
        for end in range(1, len(sought) + 1):
            last = sought[end - 1]
            if end == len(sought) or sought[end] != last + 1 or place[sought[end]] != place[last]:
                yield objects[place[last]], sought[start], last + 1
                start = end

    def _read_run(self, held: _Object, start: int, stop: int, records: list[int], tags: list[int], out: Bytes) -> None:
        good = self._fetch(held, records[start:stop], tags[start:stop], out[start:stop])
        if not good:
            self.counters.records_reread += stop - start
            good = self._fetch(held, records[start:stop], tags[start:stop], out[start:stop])
        if not good:
            raise CorruptPage(
                f"{self.url}/{self.run}/{held.name} differs from its checksums (layer {tags[start] >> 32}, page"
                f" {tags[start] & 0xFFFFFFFF} and following); it was not used. Run the prompt again; if this comes back, the"
                " object store is failing"
            )

    def _fetch(self, held: _Object, records: list[int], tags: list[int], rows: Bytes) -> bool:
        """Read records of one object once; returns whether all of them are what was written."""
        import obstore

        size = self.spec.record_bytes
        spans = list(neighbours(records))
        parts = self._ask(
            "read from",
            lambda: obstore.get_ranges(
                self._store,
                f"{self.run}/{held.name}",
                starts=[(records[start] - held.first) * size for start, _ in spans],
                lengths=[(stop - start) * size for start, stop in spans],
                coalesce=GAP_BYTES,
            ),
        )
        for (start, stop), part in zip(spans, parts, strict=True):
            if len(part) != (stop - start) * size:
                return False
            rows[start:stop] = np.frombuffer(part, np.uint8).reshape(stop - start, size)
        return all(
            open_record(row, record, tag, self.spec.warm_bytes, self._cipher)
            for row, record, tag in zip(rows, records, tags, strict=True)
        )

    def free(self, record: int) -> None:
        """Forget a record; the object of the last one is deleted, in the background."""
        if record in self._waiting:
            self._freed.add(record)
            return
        held = next(self._runs([record], [0]))[0]
        held.live -= 1
        if held.live == 0 and not self._lost:
            self._threads.submit(self._delete, [f"{self.run}/{held.name}"])

    def tier(self, record: int) -> int:
        """Return REMOTE: everything here is in the object store."""
        return Tier.REMOTE

    def close(self) -> None:
        """Delete the objects of the run; what could not be deleted is logged, since the run's results are right."""
        names = [f"{self.run}/{held.name}" for held in self._objects if held.live > 0] + [f"{self.run}/run.json"]
        self._threads.shutdown()
        if self._lost:  # a request failed: the store may be full, or gone; who asks again soon knows
            self._store = open_objects(self.url, min(self._patience_s, LAST_PATIENCE_S))
            names = self._attempted() or names
        if not self._delete(names):
            _log.warning(
                "edgekv: %s did not answer: %d objects of this run may be left in %s/%s; remove them with"
                " edgekv offload rm %s %s", self.url, len(names), self.url, self.run, self.url, self.run,
            )  # fmt: skip

    def _attempted(self) -> list[str]:
        """Return all objects of the run, also those whose writing failed half way; none where the store does not say."""
        import obstore

        try:
            return [entry["path"] for batch in obstore.list(self._store, f"{self.run}/") for entry in batch]
        except Exception:  # obstore's errors share no base with those of the system
            return []

    def _delete(self, names: list[str]) -> bool:
        """Delete objects that may be gone already; returns whether they are gone."""
        import obstore

        try:
            self._ask("delete from", lambda: obstore.delete(self._store, names))
        except FileNotFoundError:
            return True
        except StoreError:
            return False
        return True

    def _put(self, name: str, data: bytes | Bytes) -> None:
        import obstore

        self._ask("write to", lambda: obstore.put(self._store, f"{self.run}/{name}", memoryview(data)))

    def _ask(self, doing: str, request: Callable[[], Result]) -> Result:
        try:
            return request()
        except FileNotFoundError as error:
            if doing == "delete from":
                raise
            raise StoreError(
                f"cannot {doing} {self.url}: an object or the bucket is gone ({first_line(error)})"
            ) from error
        except (
            BaseException
        ) as error:  # obstore's errors share no base with those of the system, and its panics none with errors
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            self._lost = True
            raise StoreError(
                f"cannot {doing} {self.url}: {first_line(error)}. Every token so far is right. Make the store usable, give it"
                f" more than {self._patience_s:.0f} s with --offload-patience, or choose another --offload, and run again"
            ) from error
