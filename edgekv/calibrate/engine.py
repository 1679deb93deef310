"""Rates of the real engine with a real bundle: a prompt and some tokens, in RAM as fp16, as INT8, and from flash."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekv.bundle import Manifest
from edgekv.device_profiles.geometry import Geometry
from edgekv.device_profiles.work import StepWork, kv_bytes_per_token, step_work
from edgekv.plan.model import read_model
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.types import KVMode, Tier

#: Tokens of the prompt in RAM and with pages on flash, of a chunk, and of the short context; tokens generated, of which the
#: median counts. Pages are read in pieces: a context of 1024 has as many full and short ones as contexts have on average.
PROMPT, FLASH_PROMPT, CHUNK, SHORT, STEPS = 3072, 1024, 256, 64, 32


@dataclass(frozen=True)
class EngineRates:
    """What a profile says of an engine, measured with one bundle."""

    weight_read_bytes_per_s: float
    kv_read_bytes_per_s: float
    gemm_ops_per_s: float
    attention_ops_per_s: float
    overhead_s: float
    page_fetch_s: float


@dataclass(frozen=True)
class _Run:
    """Seconds of one token at the short and at the long context, of each chunk, and pages on flash in the end."""

    short_s: float
    long_s: float
    chunks_s: list[float]
    cold_pages: int


def measure_engine(
    bundle: Path,
    threads: int,
    folder: Path,
    weight_read_bytes_per_s: float | None,
    advance: Callable[[], None] = lambda: None,
) -> EngineRates:
    """Measure an engine.

    Args:
        folder: where pages go that do not fit.
        weight_read_bytes_per_s: of its matrix products alone, if known: what a token takes beyond that is overhead.
        advance: called three times.
    """
    model = read_model(bundle)
    runs = []
    ways = ((KVMode.FP16, None, PROMPT), (KVMode.INT8, None, PROMPT), (KVMode.INT8, "25%", FLASH_PROMPT))
    for mode, budget, prompt in ways:
        runs.append(_run(bundle, threads, folder, mode, budget, prompt))
        advance()
    fp16, int8, flash = runs
    short = min(fp16.short_s, int8.short_s)
    dense = step_work(
        model.geometry, n_tokens=1, context=SHORT, bits_per_weight=model.bits_per_weight, kv_bytes_per_token=0
    )
    bandwidth = weight_read_bytes_per_s or dense.weight_bytes / short
    overhead = max(0.0, short - dense.weight_bytes / bandwidth)
    slopes = []
    for run, compressed in ((fp16, False), (int8, True)):
        read = kv_bytes_per_token(model.pages, compressed=compressed) * (PROMPT - SHORT)
        slopes.append(max(run.long_s - run.short_s, 0.02 * run.short_s) / read)
    gemm, attention = _prefill_rates(model.geometry, fp16.chunks_s, int8.chunks_s, overhead)
    # What the flash run would take in RAM, between the two contexts of the INT8 run.
    share = (FLASH_PROMPT - SHORT) / (PROMPT - SHORT)
    extra = flash.long_s - int8.short_s - share * max(int8.long_s - int8.short_s, 0.0)
    return EngineRates(
        weight_read_bytes_per_s=dense.weight_bytes / (short - overhead),
        kv_read_bytes_per_s=1 / statistics.mean(slopes),
        gemm_ops_per_s=gemm,
        attention_ops_per_s=attention,
        overhead_s=overhead,
        page_fetch_s=max(extra, 0.0) / max(flash.cold_pages, 1),
    )


def _run(bundle: Path, threads: int, folder: Path, mode: KVMode, budget: str | None, prompt: int) -> _Run:
    options = RunOptions(
        kv=mode, kv_budget=budget, context=prompt + STEPS, threads=threads, offload=folder, prefill_chunk=CHUNK
    )
    with Generator.open(bundle, options) as generator:
        tokens = _tokens(generator.manifest)[:prompt]
        generator.prefill(tokens[:SHORT], max_tokens=1)  # warms up
        stamps = [time.perf_counter()]
        # Another first token each time, so that nothing of the context before is reused.
        generator.prefill(
            [*tokens[1:], tokens[0]], max_tokens=STEPS, progress=lambda *_: stamps.append(time.perf_counter())
        )
        long = _steps(generator, tokens)
        cache = generator.report().cache
        assert cache is not None
        generator.prefill(tokens[:SHORT], max_tokens=STEPS)
        short = _steps(generator, tokens)
        return _Run(short, long, np.diff(stamps).tolist(), cache.pages_by_tier.get(Tier.COLD.name, 0))


def _tokens(manifest: Manifest) -> list[int]:
    tokens: list[int] = np.random.default_rng(7).integers(2, manifest.model.vocab_size, PROMPT).tolist()
    return tokens


def _steps(generator: Generator, tokens: list[int]) -> float:
    times = []
    for token in tokens[:STEPS]:
        start = time.perf_counter()
        generator.step([token])
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _prefill_rates(shape: Geometry, one: list[float], other: list[float], overhead: float) -> tuple[float, float]:
    """Fit ``ops / gemm + attention ops / attention + overhead`` to the chunks, each the faster of two runs."""
    work = [
        step_work(shape, n_tokens=CHUNK, context=start, bits_per_weight=8, kv_bytes_per_token=0, logits=0)
        for start in range(0, PROMPT, CHUNK)
    ]
    times = np.array([min(pair) for pair in zip(one, other, strict=True)]) - overhead
    slope = _slope(work, times)
    gemm_s = statistics.median(float(t) - slope * w.attention_ops for t, w in zip(times, work, strict=True))
    return work[0].ops / gemm_s, 1 / slope


def _slope(work: list[StepWork], times: np.ndarray) -> float:
    """Return the seconds per attention operation, by the median slope between chunks (Theil-Sen)."""
    slopes = [
        float(times[j] - times[i]) / (work[j].attention_ops - work[i].attention_ops)
        for i in range(len(work))
        for j in range(i + 1, len(work))
    ]
    return max(statistics.median(slopes), 1e-15)
