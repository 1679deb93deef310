"""The native kernels (runtime/native). What the functions mean is said in :mod:`edgekv.runtime.kernels.interface`."""

from edgekv.runtime.kernels.interface import Addresses, BuildFacts, Bytes, Float, Half, Int64, Refs

RUN_PAGES: int

def isa() -> str: ...
def build() -> BuildFacts: ...
def available_isas() -> tuple[str, ...]: ...
def dense_names() -> str: ...
def operators(n_threads: int) -> int: ...
def operator_threads() -> int: ...
def read_seconds(pool: ThreadPool, array: Bytes) -> float: ...
def onnxruntime_executor() -> int: ...

class ThreadPool:
    def __init__(self, n_threads: int, executor: int = 0) -> None: ...
    @property
    def n_threads(self) -> int: ...

class Attention:
    def __init__(
        self,
        pool: ThreadPool,
        n_q_heads: int,
        n_kv_heads: int,
        head_dim: int,
        page_size: int,
        scale: float,
        softcap: float = 0.0,
        sinks: Float | None = None,
        max_tokens: int = 512,
        isa: str = "",
    ) -> None: ...
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
    ) -> None: ...
    def begin(
        self,
        q: Float,
        new_k: Float,
        new_v: Float,
        positions: Int64,
        window: int,
        n_pages: int,
        want_mass: bool = False,
    ) -> None: ...
    def pages(self, refs: Refs, start: int, stop: int) -> None: ...
    def stream(
        self,
        rows: RecordStream,
        layer: int,
        q: Float,
        new_k: Float,
        new_v: Float,
        positions: Int64,
        refs: Refs,
        out: Float,
        window: int = 0,
        page_mass: Float | None = None,
    ) -> int: ...
    def finish(self, out: Float, page_mass: Float | None = None, log_sum_exp: Float | None = None) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def buffer_bytes(self) -> int: ...

def pack_warm(
    hot_page: Bytes | int, out: Bytes | int, n_kv_heads: int, head_dim: int, page_size: int, n_slots: int = -1
) -> None: ...
def pack_warm_many(
    pool: ThreadPool,
    sources: Addresses,
    targets: Addresses,
    n_slots: Int64,
    n_kv_heads: int,
    head_dim: int,
    page_size: int,
) -> None: ...
def write_hot(page: Bytes | int, slot: int, k: Float, v: Float, page_size: int) -> bool: ...
def page_bounds(refs: Refs, low: Half, high: Half, page_size: int) -> None: ...
def checksums(rows: Bytes, start: int, stop: int, out: Addresses) -> None: ...

class RecordStream:
    def __init__(self, reader: RecordReader, rows: Bytes, capacity: int, n_layers: int, most: int) -> None: ...
    @property
    def reads(self) -> int: ...
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
    ) -> None: ...
    def forget(self) -> None: ...

class RecordReader:
    def __init__(self, depth: int, how: str = "") -> None: ...
    @property
    def how(self) -> str: ...
    def submit(self, file: int, places: Int64, rows: Bytes, heads: Bytes, payload_bytes: int) -> int: ...
    def wait(self, ticket: int, pool: ThreadPool | None = None) -> bytes: ...
