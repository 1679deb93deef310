"""Exact streaming against what it cannot beat: the compute alone, and the medium's own sequential read rate.

    python -m benchmarks.flash.streaming BUNDLE [--context 4096] [--over 4] [--rounds 5] [--offload DIR]

The cache of INT8 pages is ``--over`` times the budget, so that most of it comes from flash for every token. Each round
measures, one after the other: a few tokens with every page in RAM, a few with the budget, and sequential O_DIRECT reads of the
same medium, at the best of several request sizes and depths, into ordinary memory (4 KiB pages, as most programs that measure
drives do) and into huge pages, which some drives fill much faster. One JSON line per round, then the median ratio against the
faster of the two; exits with 1 when it is above 1.15, unless the model is too small for a bar. A third rate is only told: into
huge pages, each byte looked at once.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.speed import timing
from edgekv.bundle import read_manifest
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.system.buffers import aligned_rows
from edgekv.tiers import KVMode

BAR = 1.15
MIB = 1024 * 1024
#: A smaller bundle is held against no bar.
LEAST_BYTES = 64 * MIB
#: (bytes per request, requests in flight) of the sequential reads; the fastest counts.
SHAPES = ((256 * 1024, 4), (MIB, 2), (MIB, 4), (4 * MIB, 2), (4 * MIB, 4))


class Medium:
    """A file of its own in the offload folder, read sequentially around the page cache."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self._size = size_bytes // (4 * MIB) * 4 * MIB
        self._scratch = tempfile.NamedTemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as this object
        self._rows = aligned_rows(4, 4 * MIB)
        self._rows[:] = 1  # a page that was never written to is not there yet
        block = mmap.mmap(-1, 4 * MIB)
        block.write(os.urandom(4 * MIB))
        out = os.open(self._scratch.name, os.O_WRONLY | os.O_DIRECT)
        for offset in range(0, self._size, 4 * MIB):
            os.pwrite(out, block, offset)
        os.fsync(out)
        os.close(out)
        self._file = os.open(self._scratch.name, os.O_RDONLY | os.O_DIRECT)

    def bytes_per_s(self, *, huge: bool, looked_at: bool = False) -> float:
        """Return the best rate of all request shapes, into huge or ordinary pages."""
        return max(self._rate(request, depth, huge, looked_at) for request, depth in SHAPES)

    def _rate(self, request: int, depth: int, huge: bool, looked_at: bool) -> float:
        offsets = iter(range(0, self._size, request))

        def reader(buffer: mmap.mmap | memoryview) -> None:
            for offset in offsets:  # one iterator for all threads: each takes the next request
                os.preadv(self._file, [buffer], offset)
                if looked_at:
                    np.frombuffer(buffer, np.uint64).sum()

        buffers = [row[:request].data if huge else mmap.mmap(-1, request) for row in self._rows[:depth]]
        with ThreadPoolExecutor(depth) as threads:
            started = time.perf_counter()
            list(threads.map(reader, buffers))
            return self._size / (time.perf_counter() - started)


def token_seconds(generator: Generator, count: int) -> tuple[float, float]:
    """Return the median seconds of a token, and the bytes read from flash for each."""
    store = generator.cache.manager.store if generator.cache else None
    before = store.counters.bytes_read if store is not None else 0
    times = []
    for _ in range(count):
        started = time.perf_counter()
        generator.step([5])
        times.append(time.perf_counter() - started)
    read = store.counters.bytes_read - before if store is not None else 0
    return statistics.median(times), read / count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--over", type=float, default=4.0, help="cache size over budget")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=6, help="tokens per round, each way")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--offload", type=Path, help="folder on the medium to measure; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.offload) as scratch:
        return run(options, Path(scratch))


def run(options: argparse.Namespace, folder: Path) -> int:
    manifest = read_manifest(options.bundle)
    spec = manifest.model.pages(manifest.page_size)
    pages = spec.n_layers * -(-options.context // spec.page_size)
    cache_bytes = pages * spec.warm_bytes
    context = options.context + 2 * options.rounds * options.tokens + 2 * timing.SPARE
    settings = RunOptions(kv=KVMode.INT8, context=context, threads=options.threads)
    resident = Generator.open(options.bundle, settings)
    budget = int(cache_bytes / options.over)
    streamed = resident.fork(replace(settings, kv_budget=budget, offload=folder / "pages"))
    prompt = timing.prompt(options.context, manifest.model.vocab_size)
    for generator in (resident, streamed):
        generator.prefill(prompt, max_tokens=1)
        token_seconds(generator, 2)
    medium = Medium(folder, 256 * MIB)
    rows = []
    for _ in range(options.rounds):
        meter = timing.Meter()
        compute, _ = token_seconds(resident, options.tokens)
        token, read = token_seconds(streamed, options.tokens)
        plain, huge = medium.bytes_per_s(huge=False), medium.bytes_per_s(huge=True)
        looked_at = medium.bytes_per_s(huge=True, looked_at=True)
        rate = max(plain, huge)
        limit = max(compute, read / rate)
        row = {
            "bench": "flash_streaming",
            "context": options.context,
            "cache_mb": round(cache_bytes / 1e6, 1),
            "budget_mb": round(budget / 1e6, 1),
            "read_mb": round(read / 1e6, 1),
            "medium_mb_s": round(rate / 1e6),
            "ordinary_memory_mb_s": round(plain / 1e6),
            "looked_at_mb_s": round(looked_at / 1e6),
            "compute_ms": round(1e3 * compute, 2),
            "medium_ms": round(1e3 * read / rate, 2),
            "token_ms": round(1e3 * token, 2),
            "ratio": round(token / limit, 3),
            "ordinary_memory_ratio": round(token / max(compute, read / plain), 3),
            "other_cpu": meter.other_cpu(),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    ratio = statistics.median(float(row["ratio"]) for row in rows)
    said = f"decode time per token / max(compute, bytes / sequential rate): {ratio:.2f}"
    if sum(entry["bytes"] for entry in manifest.files.values()) < LEAST_BYTES:
        print(f"{said} (no bar: this model is so small that a token's fixed costs weigh more than its reads;"
              " BENCH_BUNDLE=FOLDER make bench-flash measures one of 64 MiB or more)")  # fmt: skip
        return 0
    print(f"{said} (bar <= {BAR}): {'met' if ratio <= BAR else 'missed'}")
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
