"""The kernels behind paged attention: the native extension, or NumPy where it is missing.

Both offer the same names (:class:`Kernels`); :func:`load_kernels` chooses. The NumPy kernels have the same
meaning and the same independence of how pages are cut into pieces, and are slow.
"""

from __future__ import annotations

from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Half = NDArray[np.float16]
Int8 = NDArray[np.int8]
Int64 = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Addresses = NDArray[np.uint64]
#: An array of dtype :data:`PAGE_REF`.
Refs = NDArray[np.void]

KIND_HOT = 0
KIND_WARM = 1

#: One page as the kernels see it. ``data``: address of its bytes, 0 where there is nothing (skipped);
#: ``mask``: bit ``i % 64`` of word ``i // 64`` is set where slot i holds a live token; ``position``: of the
#: token in slot 0 (slot i is at ``position + i``); ``n_slots``: written slots, the live ones are below;
#: ``kind``: KIND_HOT or KIND_WARM. Slots that are not live may hold any bytes.
PAGE_REF = np.dtype(
    {
        "names": ["data", "mask", "position", "n_slots", "kind"],
        "formats": [np.uint64, (np.uint64, 2), np.int64, np.uint16, np.uint8],
        "offsets": [0, 8, 24, 32, 34],
        "itemsize": 48,
    }
)


class BuildFacts(TypedDict):
    """What kernels were compiled from, for and with; empty where that is not known, or nothing was compiled.

    ``isas``: instruction sets beyond the baseline, by their names; which of them runs is decided when it is known where.
    ``c_library``: the C library compiled for, with its version: the oldest that will do.
    """

    commit: str
    processor: str
    isas: str
    c_library: str
    compiler: str


class Pool(Protocol):
    """The threads that kernels run on."""

    @property
    def n_threads(self) -> int:
        """Threads that work, the caller included."""


class PagedAttention(Protocol):
    """Attention of one layer's geometry. One step at a time; results do not depend on threads or pieces."""

    def run(
        self,
        q: Float,
        new_k: Float,
        new_v: Float,
        positions: Int64,
        refs: Refs,
        out: Float,
        window: int = 0,
        page_mass: Float | None = None,
        log_sum_exp: Float | None = None,
    ) -> None:
        """Attend new tokens to ``refs`` (in logical order) and causally to themselves.

        q [T, n_q_heads, head_dim], new_k and new_v [T, n_kv_heads, head_dim], positions [T] increasing; writes
        out [T, n_q_heads, head_dim], page_mass [len(refs)], and log_sum_exp [T, n_q_heads]: the logarithm of the summed
        exponentials of all scores that a query saw, sinks included (-1e30 where it saw none).
        :func:`edgekv.seam.paged_attention` says what it means.

        Raises:
            ValueError: an array has another shape or dtype, or is not contiguous.
        """

    def begin(
        self,
        q: Float,
        new_k: Float,
        new_v: Float,
        positions: Int64,
        window: int,
        n_pages: int,
        want_mass: bool = False,
    ) -> None:
        """Start a step whose pages come in pieces. The arrays may be reused when this returns."""

    def pages(self, refs: Refs, start: int, stop: int) -> None:
        """Attend to ``refs[start:stop)``, which are in memory now; ``refs`` is the whole step's array.

        Pieces come in order; start and stop are multiples of RUN_PAGES, except a stop at the end.
        """

    def finish(self, out: Float, page_mass: Float | None = None, log_sum_exp: Float | None = None) -> None:
        """Attend to the new tokens themselves and write the result, as :meth:`run` does."""

    @property
    def isa(self) -> str:
        """Name of the instruction set in use."""

    @property
    def buffer_bytes(self) -> int:
        """Memory held for intermediate results."""


class RecordReads(Protocol):
    """Reads records of page files in the background, and checks them."""

    @property
    def how(self) -> str:
        """Who reads: "io_uring", "threads", or, of the NumPy kernels, the "caller"."""

    def submit(self, file: int, places: Int64, rows: Bytes, heads: Bytes, payload_bytes: int) -> int:
        """Start to read ``rows`` [n, row_bytes] from ``places`` [n], counted in rows, neighbours in one call.

        ``rows`` is kept until the reading has ended, also when nobody waits for it and when the reader goes: it waits for what
        is in flight. Returns a ticket.
        """
        ...

    def wait(self, ticket: int, pool: Any = None) -> bytes:
        """Wait for a request, once; what came is checked on the threads of ``pool``, without one on this thread.

        Returns:
            for each row 1 where it is a whole record that begins as ``heads`` [n, RECORD_HEAD_BYTES] said, but for its
            checksum, and has the right checksum (:mod:`edgekv.runtime.storage.record`); else 0.

        Raises:
            OSError: the system's; ``rows`` must not be used.
        """


class RecordStreams(Protocol):
    """Walks the layers of a step over pages in one file, and reads ahead by itself, across layers and steps."""

    @property
    def reads(self) -> int:
        """Reads of the file that brought what was attended to so far."""

    def plan(
        self,
        layer: int,
        file: int,
        stops: Int64,
        counts: Int64,
        pages: Int64,
        places: Int64,
        heads: Bytes,
        payload_bytes: int,
    ) -> None:
        """Say what a layer consists of: pieces of whole runs.

        ``stops`` [n_pieces]: the page behind each piece; ``counts`` [n_pieces]: how many of its pages are in the file. Of these,
        in order: ``pages`` [n], which they are, ``places`` [n], counted in rows, and ``heads`` [n, RECORD_HEAD_BYTES].
        What was read ahead is forgotten.
        """
        ...

    def forget(self) -> None:
        """Forget what was read ahead, once it has landed: the memory is free for others."""
        ...


class StreamingAttention(Protocol):
    """What a :class:`PagedAttention` of the native kernels can do besides."""

    def stream(
        self,
        rows: Any,
        layer: int,
        q: Float,
        new_k: Float,
        new_v: Float,
        positions: Int64,
        refs: Refs,
        out: Float,
        window: int = 0,
        page_mass: Float | None = None,
    ) -> int:
        """Do :meth:`PagedAttention.run`, with the pages of the plan taken from ``rows``, a :class:`RecordStreams`.

        Returns:
            -1, or the first row of the plan that is not what was written: then ``out`` must not be used.

        Raises:
            OSError: the system's; ``out`` must not be used.
        """
        ...


class Kernels(Protocol):
    """What ``load_kernels`` returns. A page argument is an address or a uint8 array."""

    RUN_PAGES: int

    def isa(self) -> str:
        """Name of the instruction set in use; "numpy" for the NumPy kernels."""

    def build(self) -> BuildFacts:
        """What the kernels were compiled from and for."""

    def available_isas(self) -> tuple[str, ...]:
        """Names that EDGEKV_ISA may have here, the preferred one first."""

    def ThreadPool(self, n_threads: int, executor: int = 0) -> Pool:
        """Start a pool of ``n_threads``, the calling thread included.

        Args:
            executor: address of a function that runs tasks on the threads of an engine (``Executor`` in
                native/thread_pool.h); the pool then starts none of its own.
        """

    def Attention(
        self,
        pool: Any,
        n_q_heads: int,
        n_kv_heads: int,
        head_dim: int,
        page_size: int,
        scale: float,
        softcap: float = 0.0,
        sinks: Float | None = None,
        max_tokens: int = 512,
        isa: str = "",
    ) -> PagedAttention:
        """Prepare attention for one geometry."""

    def pack_warm(
        self, hot_page: Bytes | int, out: Bytes | int, n_kv_heads: int, head_dim: int, page_size: int, n_slots: int = -1
    ) -> None:
        """Quantise a HOT page as :func:`edgekv.codec.pack_warm` does; slots from ``n_slots`` on count as zero (-1: none)."""

    def pack_warm_many(
        self,
        pool: Any,
        sources: Addresses,
        targets: Addresses,
        n_slots: Int64,
        n_kv_heads: int,
        head_dim: int,
        page_size: int,
    ) -> None:
        """:meth:`pack_warm` for many pages, by address."""

    def write_hot(self, page: Bytes | int, slot: int, k: Float, v: Float, page_size: int) -> bool:
        """Write tokens, k and v [n, n_kv_heads, head_dim], into a HOT page from ``slot`` on.

        Returns:
            Whether all of them are in fp16's range. What lies beyond it saturates.
        """

    def page_bounds(self, refs: Refs, low: Half, high: Half, page_size: int) -> None:
        """Smallest and largest decoded key per page, head and channel over the live slots, rounded outwards.

        low and high [n, n_kv_heads, head_dim]; zeros for a page without a live slot.
        """

    def checksums(self, rows: Bytes, start: int, stop: int, out: Addresses) -> None:
        """XXH3-64 of bytes [start, stop), more than 240, of each row of ``rows`` [n, row_bytes]; ``out`` [n] uint64."""

    def RecordReader(self, depth: int, how: str = "") -> Any:
        """A reader of records in the background: a :class:`RecordReads`.

        Args:
            depth: reads in flight at a time, where threads read.
            how: "io_uring" or "threads"; "" is the first of them that the system allows. The NumPy kernels have "caller".

        Raises:
            ValueError: ``how`` names what this system does not have.
        """

    def RecordStream(self, reader: Any, rows: Bytes, capacity: int, n_layers: int, most: int) -> Any:
        """Return a :class:`RecordStreams` over slots of ``capacity`` rows each; only the native kernels have one.

        Args:
            most: slots that are on their way at a time.
        """

    def read_seconds(self, pool: Any, array: Bytes) -> float:
        """Seconds to merely read ``array`` with all threads."""
