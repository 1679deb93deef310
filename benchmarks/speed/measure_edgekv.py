"""Measure edgekv: one bundle, one context, one kind of page. Prints one JSON line.

After the timed tokens, a second pass says where a token's time goes: dense segments, attention kernel, and the rest,
which is the page manager and Python.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.tiers import KVMode

from . import timing


class Stopwatch:
    """Counts the seconds that wrapped functions take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - started
            return result

        return timed


class Timed:
    """Stands in for an object and times some of its methods."""

    def __init__(self, inner: Any, stopwatch: Stopwatch, methods: tuple[str, ...]) -> None:
        self._inner = inner
        for name in methods:
            setattr(self, name, stopwatch.wrap(getattr(inner, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def profile(generator: Generator, token: int, rounds: int = 16) -> dict[str, float]:
    """Return the median milliseconds of a token: dense, attention, and rest."""
    assert generator.prepared is not None
    forward: Any = generator.prepared.forward
    dense, attention = Stopwatch(), Stopwatch()
    forward._engine = forward._token_step._engine = Timed(forward._engine, dense, ("run", "head"))
    attender = forward._attender
    attender._attention = Timed(attender._attention, attention, ("run",))
    rows = []
    for _ in range(rounds):
        dense.seconds = attention.seconds = 0.0
        started = time.perf_counter()
        generator.step([token])
        total = time.perf_counter() - started
        rows.append((total, dense.seconds, attention.seconds, total - dense.seconds - attention.seconds))
    names = ("profiled_ms", "dense_ms", "attention_ms", "rest_ms")
    return {
        name: round(1e3 * statistics.median(column), 3)
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def memory_limit(generator: Generator, context: int, threads: int) -> float:
    """Return the tokens/s at which decoding would do nothing but read each weight and each page once."""
    manifest = generator.manifest
    # A row of the embedding is all that a token reads of it; where the head is the same tensor, it is in the program.
    embedding = manifest.embedding.file if manifest.embedding and manifest.engine == "executorch" else ""
    weights = sum(
        entry["bytes"]
        for name, entry in manifest.files.items()
        if name.endswith((".pte", ".onnx", ".bin")) and (name != embedding or name.endswith(".pte"))
    )
    spec = manifest.model.pages(manifest.page_size)
    pages = context // manifest.page_size * spec.n_layers * spec.warm_bytes
    kernels, data = load_kernels(), np.ones(weights + pages, np.uint8)
    pool = kernels.ThreadPool(threads)
    return 1 / min(kernels.read_seconds(pool, data) for _ in range(9))


def main(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    settings = RunOptions(
        kv=KVMode(options.kv),
        context=options.context + timing.GENERATE + 2 * timing.SPARE,
        threads=options.threads,
        own_process=True,
    )
    generator = Generator.open(options.model, settings)
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
    timing.emit({**line, **profile(generator, token)})


if __name__ == "__main__":
    main(timing.arguments(__doc__))
