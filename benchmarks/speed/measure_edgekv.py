"""Measure edgekv: one bundle, one context, one kind of page. Prints one JSON line.

After the timed tokens, a second pass says where a token's time goes: dense segments, attention kernel, and the rest,
which is the page manager and Python.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.kernels.interface import Refs
from edgekv.runtime.machine import Host
from edgekv.runtime.meter import Silence
from edgekv.tiers import KVMode

from . import timing


class Stopwatch(Silence):
    """A meter that counts the seconds of a step of one token: segments, attention, and from its beginning to its head.

    Writing a token's keys and values into its page happens between the attention of a layer and the next segment, and counts
    as that segment's: some microseconds a layer.
    """

    def __init__(self) -> None:
        self.dense = self.attention = 0.0
        self._at = 0.0

    def _lap(self) -> float:
        before, self._at = self._at, time.perf_counter()
        return self._at - before

    def token_began(self, refs: Refs, position: int) -> None:
        """Start the watch; what came before was bookkeeping."""
        self._lap()

    def segment_ran(self) -> None:
        """Count a segment."""
        self.dense += self._lap()

    def token_layer(self, layer: int, streamed: bool) -> int:
        """Count the attention of a layer."""
        self.attention += self._lap()
        return -1

    def token_ended(self) -> None:
        """Count nothing: adding the token to the cache is bookkeeping."""
        self._lap()

    def head_ran(self, rows: int) -> None:
        """Count the last segment."""
        self.dense += self._lap()


class Watched(Host):
    """A machine with a stopwatch."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = Stopwatch()


def profile(generator: Generator, watch: Stopwatch, token: int, rounds: int = 16) -> dict[str, float]:
    """Return the median milliseconds of a token: dense, attention, and rest: the page manager and Python."""
    rows = []
    for _ in range(rounds):
        watch.dense = watch.attention = 0.0
        started = time.perf_counter()
        generator.step([token])
        total = time.perf_counter() - started
        rows.append((total, watch.dense, watch.attention, total - watch.dense - watch.attention))
    names = ("profiled_ms", "dense_ms", "attention_ms", "rest_ms")
    return {
        name: round(1e3 * statistics.median(column), 3)
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def memory_limit(generator: Generator, context: int, threads: int) -> float:
    """Return the tokens/s at which decoding would do nothing but read each weight and each page once."""
    manifest = generator.manifest
    embedding = manifest.embedding.file if manifest.embedding and manifest.engine == "executorch" else ""
    weights = sum(
        entry["bytes"]
        for name, entry in manifest.files.items()
        if name.endswith((".pte", ".onnx", ".bin")) and name != embedding
    )
    spec = manifest.model.pages(manifest.page_size)
    pages = context // manifest.page_size * spec.n_layers * spec.warm_bytes
    kernels, data = load_kernels(), np.ones(weights + pages, np.uint8)
    pool = kernels.ThreadPool(threads)
    return 1 / min(kernels.read_bandwidth(pool, data) for _ in range(9))


def main(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    settings = RunOptions(
        kv=KVMode(options.kv),
        context=options.context + timing.GENERATE + 2 * timing.SPARE,
        threads=options.threads,
        own_process=True,
    )
    machine = Watched()
    generator = Generator.open(options.model, settings, machine)
    load_s = time.perf_counter() - started
    generator.prefill([3] * timing.WARM_UP, max_tokens=1)
    start_s = timing.process_age_s()
    generator.step([3])
    token = 0

    def prefill(tokens: list[int]) -> None:
        nonlocal token
        token = int(generator.prefill(tokens, max_tokens=timing.GENERATE).argmax())

    def step() -> None:
        nonlocal token
        token = int(generator.step([token]).argmax())

    line = timing.Timing(options, "edgekv", load_s).measure(prefill, step)
    line |= {"isa": generator.kernels.isa(), "start_s": round(start_s, 2)}
    line["limit_tok_s"] = round(memory_limit(generator, options.context, options.threads), 1)
    timing.emit({**line, **profile(generator, machine.meter, token)})


if __name__ == "__main__":
    main(timing.arguments(__doc__))
