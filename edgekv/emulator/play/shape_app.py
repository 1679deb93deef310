"""A model that is only its shape: the page table, policies and flash traffic of a run without weights, kernels and text.

The page manager and the policies are the runtime's own. What attention would prefer is not known without weights: page masses are
drawn from a log-normal distribution per page, with attention sinks and a recent window, which is what decoders show (H2O, arXiv
2306.14048; StreamingLLM, arXiv 2309.17453).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.bundle import read_manifest
from edgekv.device_profiles import kv_budget
from edgekv.device_profiles.flash import streamed_seconds
from edgekv.device_profiles.geometry import Geometry
from edgekv.device_profiles.work import BITS_PER_WEIGHT, weights_bytes
from edgekv.errors import PromptTooLong, StoreError, UsageError
from edgekv.model_config import read_json_object, read_model_config
from edgekv.runtime.attention.select import AttendOptions, parse_attend
from edgekv.runtime.pages.budget import RUNTIME_OVERHEAD_BYTES, BudgetPlan, plan_budget
from edgekv.runtime.pages.cache import KVCache
from edgekv.runtime.pages.policy import CacheOptions, make_policy
from edgekv.spec import RECORD_HEADER_BYTES
from edgekv.tiers import KVMode, Tier

from ..charges.cost import StepCost
from ..device import Device
from .blank import BLANK_KERNELS, BlankArena, BlankStore, blank_tokens
from .result import PageMap, page_map
from .scenario import AppSettings, Turn

#: Spread of page masses (sigma of the logarithm), and what the first page and the newest ones have more than others.
MASS_SPREAD, SINK, RECENT, RECENT_PAGES = 1.5, 20.0, 10.0, 8.0


@dataclass(frozen=True)
class Shape:
    """A model that could be exported: its geometry, and the choices of an export."""

    model: Geometry
    architecture: str
    engine: str = "onnx"
    weights: str = "int4"
    page_size: int = 32

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights in RAM."""
        return weights_bytes(self.model, BITS_PER_WEIGHT[self.engine][self.weights])


def read_shape(path: Path, *, engine: str = "onnx", weights: str = "int4", page_size: int = 32) -> Shape:
    """Read the config.json of a Hugging Face model.

    Raises:
        UsageError: it cannot be read, edgekv does not export it (the message names the key), or there is no such engine or
            weight type.
    """
    if engine not in BITS_PER_WEIGHT or weights not in BITS_PER_WEIGHT[engine]:
        raise UsageError(f"no weights {weights!r} for engine {engine!r}; engines are {', '.join(BITS_PER_WEIGHT)}")
    model = read_model_config(read_json_object(path), str(path))
    return Shape(Geometry.from_model(model), model.architecture, engine, weights, page_size)


def shape_of(bundle: Path) -> Shape:
    """Return the shape of a bundle, without its weights.

    Raises:
        BundleError: it is none.
    """
    manifest = read_manifest(bundle)
    model = Geometry.from_model(manifest.model)
    return Shape(model, manifest.model.architecture, manifest.engine, manifest.weights, manifest.page_size)


class WeightlessApp:
    """An :class:`~edgekv.emulator.play.bundle_app.App` without a model.

    Raises (from the constructor):
        UsageError, ProfileError, BudgetError: the run is impossible; the message says why.
    """

    def __init__(self, shape: Shape, device: Device, settings: AppSettings, *, seed: int, context: int) -> None:
        self._shape = shape
        self._device = device
        self._settings = settings
        self._context = context
        self._cost = StepCost.of(device.profile, shape.model, shape.engine, shape.weights, shape.page_size)
        self._attend = parse_attend(settings.attend)
        if self._attend.epsilon is not None:
            raise UsageError(
                "without weights nothing is known of the attention missed: give --attend selective:N or :SHARE"
            )
        spec = self._cost.pages
        budget = settings.kv_budget
        if budget is None:
            budget = kv_budget(device.profile, shape.weights_bytes, RUNTIME_OVERHEAD_BYTES).kv_bytes
        self._plan = plan_budget(
            spec,
            kv_budget=budget,
            context=context,
            mode=KVMode.INT8 if settings.session else KVMode(settings.kv),
            run_pages=BLANK_KERNELS.RUN_PAGES,
            selective=self._attend.selective,
        )
        self._random = np.random.default_rng(seed)
        pages = -(-context // spec.page_size)
        self._popularity = np.exp(self._random.normal(0, MASS_SPREAD, (spec.n_layers, pages))).astype(np.float32)
        self._popularity[:, 0] *= SINK
        self._cache: KVCache | None = None
        self._request = self._said = self._max_tokens = self._saved = 0
        self.computed_tokens = 0

    # -- the app -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the weights; a session's pages are read again."""
        device, spec, plan, settings = self._device, self._cost.pages, self._plan, self._settings
        device.load_weights(self._shape.weights_bytes)
        options = CacheOptions(
            budget_bytes=plan.arena_bytes,
            compress_at_seal=plan.compress_at_seal,
            allow_drop=settings.allow_drop,
            policy=make_policy(settings.policy),
        )
        keeps = settings.session or not (plan.fits or settings.allow_drop)
        store = BlankStore(spec, device.medium, device.clock) if keeps else None
        pages = -(-self._context // spec.page_size)
        self._cache = KVCache(spec, options, BLANK_KERNELS, store, max_pages=pages, arena=BlankArena)
        device.watch(self._cache, plan, lambda: None)
        held, self._saved = self._saved, 0
        if held:
            self._wait(held // spec.page_size * spec.n_layers)
            for start in range(0, held, settings.prefill_chunk):
                self._append(start, min(settings.prefill_chunk, held - start))
            self._saved = held

    def ask(self, turn: Turn) -> int:
        """Add a prompt by its length.

        Raises:
            UsageError: it is a text.
        """
        if turn.prompt_tokens is None:
            raise UsageError("without weights there is no tokenizer: a turn has prompt_tokens instead of a text")
        self._request += self._said + turn.prompt_tokens
        self._said, self._max_tokens = 0, turn.max_tokens
        return turn.prompt_tokens

    def answer(self) -> Iterator[int]:
        """Compute what is missing of the conversation, then token after token."""
        held = self._held
        self._said = max(held - self._request, 0) if self._settings.session else 0
        total = self._request + self._said
        if self._request + self._max_tokens > self._context:
            raise PromptTooLong(f"{self._request + self._max_tokens} tokens do not fit the context of {self._context}")
        while held < total:
            count = min(self._settings.prefill_chunk, total - held)
            self._step(held, count, logits=held + count == total)
            held += count
            self.computed_tokens += count
        while self._said < self._max_tokens:
            self._said += 1
            yield self._said
            if self._said < self._max_tokens:
                self._step(self._held, 1, logits=True)
        self._save()

    def said(self) -> str | None:
        """Nothing: there is no text."""
        return None

    def stop(self) -> None:
        """Forget the cache."""
        self._cache = None

    def facts(self) -> dict[str, Any]:
        """Return shape, engine and weights."""
        shape = self._shape
        return {
            "architecture": shape.architecture,
            "n_layers": shape.model.n_layers,
            "engine": shape.engine,
            "form": "weightless",
            "weights": shape.weights,
            "weights_bytes": shape.weights_bytes,
            "page_size": shape.page_size,
            "context": self._context,
        }

    def plan(self) -> BudgetPlan | None:
        """Return how the budget is divided."""
        return self._plan

    def pages(self) -> PageMap | None:
        """Return the pages of the cache."""
        return page_map(self._cache) if self._cache is not None else None

    # -- one step ----------------------------------------------------------------------------------------------

    @property
    def _held(self) -> int:
        assert self._cache is not None
        return int(self._cache.table.n_slots[0])

    def _step(self, start: int, count: int, *, logits: bool) -> None:
        """Add ``count`` tokens: the order of things is that of :class:`~edgekv.runtime.decoder.split.SplitForward`."""
        cache, device, cost = self._cache, self._device, self._cost
        assert cache is not None
        device.begin_step(count)
        cache.manager.step += 1
        n_pages = cache.table.n_pages(0)
        mass = self._mass(n_pages)
        taken = self._take(mass) if count == 1 else None
        tier = cache.table.tier[:, :n_pages]
        wanted = tier < Tier.DROPPED if taken is None else taken & (tier < Tier.DROPPED)
        cold = np.count_nonzero(wanted & (tier == Tier.COLD), axis=1)
        hot = np.count_nonzero(wanted & (tier == Tier.HOT), axis=1)
        pages = np.count_nonzero(wanted, axis=1)
        device.count_used(int(pages.sum()))
        for layer in range(cost.pages.n_layers):
            began_s = device.clock.now
            share = self._in_window(layer, start)
            slots = share * cost.pages.page_size
            pairs = count * slots * pages[layer] + count * (count + 1) / 2
            attention = cost.attention(slots * hot[layer], slots * (pages[layer] - hot[layer]), pairs)
            device.clock.compute(cost.segment(count) + attention)
            if cold[layer]:
                self._wait(int(cold[layer]), began_s)
        device.clock.compute(cost.head(int(logits)))
        if count == 1 and n_pages:
            cache.touch_all(mass if taken is None else np.where(taken, mass, np.float32(0)))
        self._append(start, count)
        every = self._settings.checkpoint_tokens
        if every and start + count - self._saved >= every:
            self._save()

    def _append(self, start: int, count: int) -> None:
        assert self._cache is not None
        nothing, positions = blank_tokens(count), np.arange(start, start + count)
        for layer in range(self._cost.pages.n_layers):
            self._cache.append(layer, nothing, nothing, positions)

    def _wait(self, records: int, began_s: float | None = None) -> None:
        """Wait for records that were asked for in pieces when a layer began, or now.

        Raises:
            StoreError: one of the reads failed.
        """
        clock, medium = self._device.clock, self._device.medium
        size_bytes = records * self._cost.pages.record_bytes
        piece_bytes = max(self._plan.piece_pages, BLANK_KERNELS.RUN_PAGES) * self._cost.pages.record_bytes
        requests = -(-size_bytes // piece_bytes)
        medium.reads += requests
        medium.drive.bytes_read += size_bytes
        self._device.count_fetched(records)
        seconds = streamed_seconds(self._device.profile.flash, size_bytes, min(piece_bytes, size_bytes))
        clock.compute(self._cost.fetch(records, requests))
        clock.wait_until((clock.now if began_s is None else began_s) + seconds)
        if medium.error_rate or medium.damage_rate:
            for _ in range(requests):
                if medium.draw():
                    raise StoreError("a page on flash cannot be read")

    def _save(self) -> None:
        """Write the pages that are sealed since the last checkpoint."""
        if self._settings.session and self._cache is not None:
            size, held = self._cost.pages.page_size, self._held
            new = range(self._saved // size, held // size)
            self._cache.manager.persist([(layer, page) for page in new for layer in range(self._cost.pages.n_layers)])
            self._saved = held

    def _in_window(self, layer: int, context: int) -> float:
        window = self._shape.model.windows[layer]
        return min(1.0, window / context) if window and context else 1.0

    # -- what attention prefers --------------------------------------------------------------------------------

    def _mass(self, n_pages: int) -> NDArray[np.float32]:
        """Return a softmax mass per page [n_layers, n_pages] that sums to 1 in each layer."""
        mass = self._popularity[:, :n_pages] + RECENT * np.exp(
            np.arange(1 - n_pages, 1, dtype=np.float32) / RECENT_PAGES
        )
        shares: NDArray[np.float32] = mass / np.maximum(mass.sum(axis=1, keepdims=True), np.float32(1e-30))
        return shares

    def _take(self, mass: NDArray[np.float32]) -> NDArray[np.bool_] | None:
        """Choose pages for a step of selective attention and make them resident as far as there is room; None takes all."""
        cache, n_pages = self._cache, mass.shape[1]
        assert cache is not None
        limit = _limit(self._attend, n_pages, cache)
        if not self._attend.selective or limit >= n_pages:
            return None
        wanted = mass * np.exp(self._random.normal(0, 0.5, mass.shape)).astype(np.float32)
        wanted[:, 0] = wanted[:, max(n_pages - 1 - cache.manager.options.recent_pages, 0) :] = np.inf
        taken = np.zeros(mass.shape, bool)
        np.put_along_axis(taken, np.argpartition(-wanted, limit - 1, axis=1)[:, :limit], True, axis=1)
        table, manager = cache.table, cache.manager
        payload = np.empty(RECORD_HEADER_BYTES, np.uint8)
        for layer in range(cache.spec.n_layers):
            table.last_used[layer, :n_pages][taken[layer]] = manager.step
            cold = np.flatnonzero(taken[layer] & (table.tier[layer, :n_pages] == Tier.COLD)).tolist()
            if cold:
                brought = cold[: manager.room_for(len(cold), layer)]
                if brought:
                    self._wait(len(brought))
                for page in brought:
                    manager.admit(layer, page, payload)
        return taken


def _limit(attend: AttendOptions, n_pages: int, cache: KVCache) -> int:
    """Return the pages of a layer that a step may attend to, as :meth:`Selector.limit` does."""
    if attend.share is not None:
        return max(1, round(attend.share * n_pages))
    if attend.pages is not None:
        return attend.pages
    return max(1, 2 * cache.manager.arena.n_frames // cache.spec.n_layers - 2)
