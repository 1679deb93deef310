"""Rates of the real engine with a real bundle: tokens and chunks at several contexts, in RAM as fp16, as INT8, and from flash.

The cache is filled with random numbers, not computed: attention takes the same time over them, and a context of 8192 tokens is
there in a second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edgekv.device_profiles.geometry import Geometry
from edgekv.device_profiles.work import kv_bytes_per_token, step_work
from edgekv.errors import BudgetError
from edgekv.plan.model import read_model
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.pages.budget import pieces_of
from edgekv.runtime.pages.cache import KVCache
from edgekv.tiers import KVMode, Tier

#: Tokens in the cache when tokens and chunks are timed: in RAM, and with pages on flash (pieces are full in long contexts only).
CONTEXTS, FLASH_CONTEXTS = (64, 2048, 8192), (512, 2048, 8192)
#: Tokens of a chunk; chunks and tokens that are timed at each context, of which the fastest and the median count; room for them.
CHUNK, CHUNKS, STEPS, ROOM = 256, 2, 24, 640
#: Room for the tokens alone: pieces are as large as the budget of the context makes them.
FLASH_ROOM = 48
#: From this share of what the drive can do on, a token that streams waits for the drive.
DRIVE_BOUND_SHARE = 0.9
#: Steps of the fit of tokens; more change it by less than the noise.
LAWSON_STEPS = 60
#: The longest context is shorter where its fp16 cache would exceed this.
CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class EngineRates:
    """What a profile says of an engine, measured with one bundle. ``streamed_bytes_per_s``: the most that it read from flash."""

    weight_read_bytes_per_s: float
    kv_read_bytes_per_s: float
    kv_fp16_read_bytes_per_s: float
    gemm_ops_per_s: float
    attention_ops_per_s: float
    overhead_s: float
    page_fetch_s: float
    piece_fetch_s: float
    streamed_bytes_per_s: float


@dataclass(frozen=True)
class Timed:
    """Seconds of a token, or of a chunk, that meets so many tokens in the cache."""

    context: int
    seconds: float


@dataclass(frozen=True)
class Fetched:
    """A token that read so many pages from flash, in so many pieces.

    ``beyond_s``: seconds of it beyond the computing. ``waits``: for the drive, so that what the host did may have taken less.
    """

    pages: int
    pieces: int
    token_s: float
    beyond_s: float
    waits: bool = False


def measure_engine(
    bundle: Path,
    threads: int,
    folder: Path,
    weight_read_bytes_per_s: float | None,
    drive_bytes_per_s: float,
    advance: Callable[[], None] = lambda: None,
) -> EngineRates:
    """Measure an engine.

    Args:
        folder: where pages go that do not fit.
        weight_read_bytes_per_s: of its matrix products alone, if known: what a token takes beyond that is overhead.
        drive_bytes_per_s: what the drive under the folder reads at the most, as far as is known.
        advance: called four times.
    """
    model = read_model(bundle)
    most = min(model.geometry.max_context - ROOM, CACHE_BYTES // model.pages.fp16_cache_bytes(1))
    options = RunOptions(threads=threads, offload=folder, prefill_chunk=CHUNK)
    with Generator.open(bundle, options) as generator:
        # The drive may be shared: what it can do is the faster of two times that lie apart.
        before = _fetched(generator, shortened(FLASH_CONTEXTS, most))
        advance()
        tokens, chunks = {}, {}
        for mode in (KVMode.FP16, KVMode.INT8):
            sequence = _Sequence(generator, mode, None, shortened(CONTEXTS, most)[-1])
            timed = [(sequence.tokens(), sequence.chunks()) for _ in sequence.filled(shortened(CONTEXTS, most))]
            tokens[mode], chunks[mode] = ([pair[index] for pair in timed] for index in (0, 1))
            sequence.close()
            advance()
        after = _fetched(generator, shortened(FLASH_CONTEXTS, most))
        advance()
    base_s, fp16_s, int8_s = fit_tokens(tokens[KVMode.FP16], tokens[KVMode.INT8])
    best = [min(pair, key=lambda one: one[2].seconds) for pair in zip(before, after, strict=True)]
    rates = [pages * model.pages.record_bytes / token.seconds for pages, _, token in best]
    drive_most = max(drive_bytes_per_s, *rates)
    fetches = [
        Fetched(
            pages,
            pieces,
            token.seconds,
            token.seconds - base_s - int8_s * token.context,
            rate > DRIVE_BOUND_SHARE * drive_most,
        )
        for (pages, pieces, token), rate in zip(best, rates, strict=True)
    ]
    dense = step_work(
        model.geometry, n_tokens=1, context=0, bits_per_weight=model.bits_per_weight, kv_bytes_per_token=0
    )
    bandwidth = weight_read_bytes_per_s or dense.weight_bytes / base_s
    overhead = max(0.0, base_s - dense.weight_bytes / bandwidth)
    fastest = [min(pair, key=lambda timed: timed.seconds) for pair in zip(*chunks.values(), strict=True)]
    gemm, attention = fit_chunks(model.geometry, fastest, overhead)
    page_s, piece_s = fit_fetches(fetches)
    per_token = {mode: kv_bytes_per_token(model.pages, compressed=mode == KVMode.INT8) for mode in tokens}
    return EngineRates(
        weight_read_bytes_per_s=dense.weight_bytes / (base_s - overhead),
        kv_read_bytes_per_s=per_token[KVMode.INT8] / int8_s,
        kv_fp16_read_bytes_per_s=per_token[KVMode.FP16] / fp16_s,
        gemm_ops_per_s=gemm,
        attention_ops_per_s=attention,
        overhead_s=overhead,
        page_fetch_s=page_s,
        piece_fetch_s=piece_s,
        streamed_bytes_per_s=max(rates),
    )


def _fetched(loaded: Generator, contexts: Sequence[int]) -> list[tuple[int, int, Timed]]:
    """Time tokens with a quarter of the fp16 cache in RAM; return pages and pieces that came from flash, and the time.

    Contexts of which a quarter is too little to run with are left out, but not the longest.
    """
    found = []
    for context in contexts:
        try:
            sequence = _Sequence(loaded, KVMode.INT8, "25%", context, FLASH_ROOM)
        except BudgetError:
            if context == contexts[-1]:
                raise
            continue
        for _ in sequence.filled([context]):
            token = sequence.tokens()
            found.append((*sequence.cold(), token))
        sequence.close()
    return found


def shortened(contexts: Sequence[int], most: int) -> list[int]:
    """Return contexts of which the longest is at most ``most``, in the same proportions."""
    return [max(1, context * min(most, contexts[-1]) // contexts[-1]) for context in contexts]


class _Sequence:
    """A sequence on a loaded bundle whose cache is filled with random numbers."""

    def __init__(self, loaded: Generator, mode: KVMode, budget: str | None, context: int, room: int = ROOM) -> None:
        options = loaded.options
        self._generator = loaded.fork(
            RunOptions(
                kv=mode,
                kv_budget=budget,
                context=context + room,
                threads=options.threads,
                offload=options.offload,
                prefill_chunk=options.prefill_chunk,
            )
        )
        self._plan = self._generator.prepare(context, room)
        self._held = 0
        self._random = np.random.default_rng(7)

    def filled(self, contexts: Sequence[int]) -> Iterator[int]:
        """Yield each context when the cache holds it."""
        cache = self._cache
        for context in contexts:
            while self._held < context:
                count = min(CHUNK, context - self._held)
                cache.manager.step += 1  # as a chunk of a prompt does: the oldest pages of every layer leave first
                keys = self._random.standard_normal((count, cache.spec.n_kv_heads, cache.spec.head_dim), np.float32)
                positions = np.arange(self._held, self._held + count)
                for layer in range(cache.spec.n_layers):
                    cache.append(layer, keys, keys, positions)
                self._held += count
            yield context

    def tokens(self) -> Timed:
        """Time single tokens; the median of all but the first ones."""
        times = [self._step(1, "last") for _ in range(STEPS + 3)]
        return Timed(self._held - STEPS // 2, statistics.median(times[3:]))

    def chunks(self) -> Timed:
        """Time chunks of a prompt; the fastest."""
        timed = [Timed(self._held, self._step(CHUNK, "none")) for _ in range(CHUNKS)]
        return min(timed, key=lambda one: one.seconds)

    def cold(self) -> tuple[int, int]:
        """Return how many pages a token reads from flash, and in how many pieces."""
        pages = self._cache.use().pages_by_tier.get(Tier.NAMES[Tier.COLD], 0)
        return pages, pieces_of(pages, self._cache.spec.n_layers, self._plan.piece_pages)

    def close(self) -> None:
        """Free the cache."""
        self._generator.close()

    @property
    def _cache(self) -> KVCache:
        cache = self._generator.cache
        assert cache is not None  # prepared by the constructor
        return cache

    def _step(self, count: int, rows: Literal["none", "last"]) -> float:
        prepared = self._generator.prepared
        assert prepared is not None
        ids = self._random.integers(2, self._generator.manifest.model.vocab_size, count)
        positions = np.arange(self._held, self._held + count)
        start = time.perf_counter()
        prepared.forward.step(ids, positions, rows)
        self._held += count
        return time.perf_counter() - start


def fit_tokens(fp16: Sequence[Timed], int8: Sequence[Timed]) -> tuple[float, float, float]:
    """Return the seconds of a token without a cache, and per cached token in fp16 and in INT8.

    The largest relative error is the least there can be (Lawson's weights, 1961): tokens take less and less for each cached token
    more, and least squares put all of that error where few tokens are cached. A cache so short that noise hides it counts
    as a fiftieth of the token.
    """
    rows = [(1.0, one.context, 0.0) for one in fp16] + [(1.0, 0.0, one.context) for one in int8]
    seconds = np.array([one.seconds for one in (*fp16, *int8)])
    relative = np.array(rows) / seconds[:, None]
    weights = np.ones(len(rows))
    for _ in range(LAWSON_STEPS):
        root = np.sqrt(weights)
        found = np.linalg.lstsq(relative * root[:, None], root, rcond=None)[0]
        errors = np.abs(relative @ found - 1)
        if errors.max() < 1e-6:
            break
        weights *= errors
        weights /= weights.mean()
    base, slope_fp16, slope_int8 = found
    base = max(base, 0.5 * seconds.min())
    least = 0.02 * base / fp16[-1].context
    return float(base), float(max(slope_fp16, least)), float(max(slope_int8, least))


def fit_chunks(shape: Geometry, chunks: Sequence[Timed], overhead: float) -> tuple[float, float]:
    """Return the operations per second of matrices and of attention, by least squares on relative errors."""
    seconds = np.array([one.seconds for one in chunks])
    rows = []
    for one in chunks:
        work = step_work(shape, n_tokens=CHUNK, context=one.context, bits_per_weight=8, kv_bytes_per_token=0, logits=0)
        rows.append((work.ops, work.attention_ops))
    targets = np.maximum(seconds - overhead, 0.1 * seconds)
    matrix_s, attention_s = np.linalg.lstsq(np.array(rows) / targets[:, None], np.ones(len(rows)), rcond=None)[0]
    fastest = (targets / np.array(rows)[:, 0]).min()
    return 1 / max(float(matrix_s), 0.1 * fastest), 1 / max(float(attention_s), 1e-15)


def fit_fetches(fetches: Sequence[Fetched]) -> tuple[float, float]:
    """Return the seconds of the host per page and per piece; neither is below zero.

    Tokens that wait for the drive hide what the host did: they count only where the others would have it take longer.
    """
    known = [one for one in fetches if one.pages and one.beyond_s > 0]
    if not known:
        return 0.0, 0.0
    page_s, piece_s = _host_costs([one for one in known if not one.waits] or known)
    if any(one.pages * page_s + one.pieces * piece_s > one.beyond_s for one in known if one.waits):
        return _host_costs(known)
    return page_s, piece_s


def _host_costs(fetches: Sequence[Fetched]) -> tuple[float, float]:
    """Return the seconds per page and per piece: least squares on errors relative to the token."""
    table = np.array([(one.pages, one.pieces, one.beyond_s) for one in fetches])
    pages, pieces, beyond = (table / np.array([[one.token_s] for one in fetches])).T
    page_s, piece_s = 0.0, -1.0
    if len(fetches) > 1:
        page_s, piece_s = np.linalg.lstsq(np.stack((pages, pieces), axis=1), beyond, rcond=None)[0]
    if page_s < 0:
        return 0.0, float(pieces @ beyond / (pieces @ pieces))
    if piece_s < 0:
        return float(pages @ beyond / (pages @ pages)), 0.0
    return float(page_s), float(piece_s)
