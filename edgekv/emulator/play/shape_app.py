"""A model that is only its shape: memory, pages, flash traffic and time of a run without weights, kernels and text.

The steps are the runtime's own, on parts without contents (:mod:`edgekv.emulator.play.blank`): whatever it decides, moves, reads
ahead or counts is what it would with weights, down to the single request.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekv.bundle import read_manifest
from edgekv.contract import ENGINES, WEIGHTS
from edgekv.device_profiles import kv_budget
from edgekv.device_profiles.geometry import Geometry
from edgekv.device_profiles.work import BITS_PER_WEIGHT, weights_bytes
from edgekv.errors import UsageError
from edgekv.model_config import read_json_object, read_model_config
from edgekv.runtime.attention.attend import Attender
from edgekv.runtime.decoder.base import Rows
from edgekv.runtime.decoder.split import SplitForward
from edgekv.runtime.options import answer_room
from edgekv.runtime.pages.budget import RUNTIME_OVERHEAD_BYTES, BudgetPlan, plan_budget
from edgekv.runtime.pages.cache import KVCache
from edgekv.runtime.pages.policy import CacheOptions, make_policy
from edgekv.runtime.sessions.index import Row
from edgekv.runtime.sessions.restore import records_of, restore_pages
from edgekv.settings import parse_attend
from edgekv.spec import ModelSpec, PageSpec, RopeSpec
from edgekv.tiers import KVMode

from ..charges.cost import StepCost
from ..device import Device
from .blank import BLANK_EMBEDDING, BLANK_ROPE, BlankArena, BlankEngine, BlankStore, BlankSummaries, blank_kernels
from .preference import Preference
from .result import PageMap, page_map
from .scenario import AppSettings, Turn


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

    @property
    def pages(self) -> PageSpec:
        """The geometry of its pages."""
        return PageSpec(self.model.n_kv_layers, self.model.n_kv_heads, self.model.head_dim, self.page_size)

    @property
    def decoder(self) -> ModelSpec:
        """What the runtime must know of the layers that attend."""
        shape = self.model
        return ModelSpec(
            architecture=self.architecture,
            n_layers=shape.n_kv_layers,
            hidden_size=shape.hidden_size,
            n_q_heads=shape.n_q_heads,
            n_kv_heads=shape.n_kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.hidden_size,
            vocab_size=shape.vocab_size,
            max_context=shape.max_context,
            rope=RopeSpec(()),
            softmax_scale=1.0,
            windows=shape.windows,
        )


def read_shape(path: Path, *, engine: str = "onnx", weights: str = "int4", page_size: int = 32) -> Shape:
    """Read the config.json of a Hugging Face model.

    Raises:
        UsageError: it cannot be read, edgekv does not export it (the message names the key), or there is no such engine or
            weight type.
    """
    if engine not in ENGINES or weights not in WEIGHTS:
        raise UsageError(
            f"no weights {weights!r} for engine {engine!r}; edgekv runs {', '.join(ENGINES)} with {', '.join(WEIGHTS)}"
        )
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

    Args:
        scratch: a folder for the page file, which stays empty.

    Raises (from the constructor):
        UsageError, ProfileError, BudgetError: the run is impossible; the message says why.
    """

    def __init__(
        self, shape: Shape, device: Device, settings: AppSettings, *, seed: int, context: int, scratch: Path
    ) -> None:
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
        self._policy = make_policy(settings.policy)
        spec = self._cost.pages
        self._n_pages = -(-context // spec.page_size)
        budget = settings.kv_budget
        if budget is None:
            budget = kv_budget(device.profile, shape.weights_bytes, RUNTIME_OVERHEAD_BYTES).kv_bytes
        self._preference = Preference(spec.n_layers, self._n_pages, seed)
        self._kernels = blank_kernels(self._preference)
        self._plan = plan_budget(
            spec,
            kv_budget=budget,
            context=context,
            mode=KVMode.INT8 if settings.session else KVMode(settings.kv),
            run_pages=self._kernels.RUN_PAGES,
            selective=self._attend.selective,
            drops=settings.allow_drop and not settings.session,
            windows=() if settings.session else shape.model.windows,
            chunk=settings.prefill_chunk,
        )
        self._scratch = scratch
        self._store: BlankStore | None = None
        self._cache: KVCache | None = None
        self._attender: Attender | None = None
        self._forward: SplitForward | None = None
        self._saved: list[Row] = []
        self._request = self._said = self._max_tokens = 0
        self.computed_tokens = 0

    # -- the app -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the weights; a session's pages are read again."""
        device, spec, plan, settings = self._device, self._cost.pages, self._plan, self._settings
        device.load_weights(self._cost, self._shape.weights_bytes)
        device.medium.still = True
        options = CacheOptions(
            budget_bytes=plan.arena_bytes,
            compress_at_seal=plan.compress_at_seal,
            allow_drop=settings.allow_drop,
            policy=self._policy,
            windows=self._shape.model.windows,
            forget_unseen=not settings.session,
        )
        if settings.session or not (plan.fits or settings.allow_drop):
            kept = [record for row in self._saved for record in row.records]
            self._store = BlankStore(self._scratch / "offload", spec, device.medium, kept)
        cache = KVCache(spec, options, self._kernels, self._store, max_pages=self._n_pages, arena=BlankArena)
        if self._attend.selective:
            cache.manager.summaries = BlankSummaries(self._preference, spec.n_layers, self._n_pages)
        self._attender = Attender(
            self._shape.decoder,
            cache,
            self._kernels,
            threads=1,
            executor=0,
            max_tokens=settings.prefill_chunk,
            piece_pages=plan.piece_pages,
            ring_pieces=plan.ring_pieces,
            attend=self._attend,
            machine=device,
        )
        self._forward = SplitForward(
            BlankEngine(self._preference), BLANK_EMBEDDING, BLANK_ROPE, cache, self._attender, device.meter
        )
        self._cache = cache
        device.watch(cache, plan, lambda: None)
        if self._store is not None and self._saved:
            restore_pages(cache, self._saved, self._store)
            device.count_fetched(self._store.counters.records_read)

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
        self._max_tokens = answer_room(self._context, self._request, self._max_tokens)
        while held < total:
            count = min(self._settings.prefill_chunk - held % self._settings.prefill_chunk, total - held)
            self._step(held, count, "last" if held + count == total else "none")
            held += count
            self.computed_tokens += count
        while self._said < self._max_tokens:
            self._said += 1
            yield self._said
            if self._said < self._max_tokens:
                self._step(self._held, 1, "last")
        self._save()

    def said(self) -> str | None:
        """Nothing: there is no text."""
        return None

    def stop(self) -> None:
        """Forget the cache; what a session holds stays, for the next start."""
        if self._attender is not None:
            self._attender.close()
        self._cache = self._attender = self._forward = None
        if self._store is not None:
            self._store.close()
            self._store = None

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

    @property
    def cache(self) -> KVCache | None:
        """The cache, while the app runs."""
        return self._cache

    # -- one step ----------------------------------------------------------------------------------------------

    @property
    def _held(self) -> int:
        assert self._cache is not None
        return int(self._cache.table.n_slots[0])

    def _step(self, start: int, count: int, rows: Rows) -> None:
        """Run ``count`` tokens from position ``start`` on."""
        assert self._forward is not None
        positions = np.arange(start, start + count, dtype=np.int64)
        self._forward.step(positions, positions, rows)
        every = self._settings.checkpoint_tokens
        if every and start + count - len(self._saved) * self._cost.pages.page_size >= every:
            self._save()

    def _save(self) -> None:
        """Write the pages that are sealed since the last checkpoint."""
        cache = self._cache
        if not self._settings.session or cache is None:
            return
        new = range(len(self._saved), self._held // cache.spec.page_size)
        cache.manager.persist([(layer, page) for page in new for layer in range(cache.spec.n_layers)])
        self._saved += [Row((), records_of(cache, page), (), b"") for page in new]
