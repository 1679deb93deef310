"""What a sequence runs on, made ready: the dense parts of a bundle once, then a cache of the right size for each sequence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from edgekv.bundle import Manifest
from edgekv.tiers import KVMode

from .attention.attend import Attender
from .attention.select import attend_options
from .decoder.base import Forward
from .decoder.embedding import Embedding
from .decoder.inline import InlineForward
from .decoder.rope import Rope
from .decoder.split import SplitForward
from .engines.base import InlineEngine, SegmentEngine
from .engines.choose import open_inline, open_segments
from .governor import Governor
from .kernels.interface import Kernels
from .machine import Machine
from .options import RunOptions
from .pages.budget import BudgetPlan, plan_budget
from .pages.cache import KVCache
from .pages.policy import CacheOptions, make_policy
from .storage.interface import Kept, PageStore
from .storage.layered import OverlaidStore
from .storage.open import check_offload, open_offload
from .system.lifetime import when_gone
from .system.process import cache_home, return_free_memory
from .turns import Turns


@dataclass(frozen=True)
class Segments:
    """The dense parts of a split bundle."""

    engine: SegmentEngine
    embedding: Embedding


def load_dense(folder: Path, manifest: Manifest, options: RunOptions, machine: Machine) -> Segments | InlineEngine:
    """Load the dense parts of a bundle; any number of caches may run on them.

    Raises:
        BundleError: it cannot be used. EngineMissing: a package that it needs is not installed. EngineError: the engine
            refused a graph.
    """
    threads, own = options.threads, options.own_process
    if manifest.form == "inline":
        inline = open_inline(folder, manifest, threads, cache_home(), own_process=own)
        machine.meter.loaded(manifest)
        return inline
    engine = open_segments(folder, manifest, threads, cache_home(), own_process=own)
    assert manifest.embedding is not None
    machine.meter.loaded(manifest)
    return Segments(engine, Embedding(folder, manifest.embedding, manifest.model))


def check_options(options: RunOptions, form: str) -> None:
    """Refuse, before anything is loaded, what a bundle of this form could not do.

    Raises:
        UsageError: ``attend`` or ``policy`` is not understood, or not for this form; options contradict each other.
    """
    check_offload(options.storage)
    attend_options(options.attend, form)
    make_policy(options.policy)


@dataclass
class Prepared:
    """A cache for one sequence of up to ``context`` tokens, and what runs on it; ``attender``: in the split form."""

    context: int
    plan: BudgetPlan
    cache: KVCache
    forward: Forward
    governor: Governor
    attender: Attender | None
    _release: contextlib.ExitStack
    _turns: Turns

    def __post_init__(self) -> None:
        self._forgotten = when_gone(self, partial(_let_go, self._turns, self._release))

    def close(self) -> None:
        """Free the cache and its file on flash; the files of a session belong to the session."""
        if self._forgotten.detach() is not None:
            self._release.close()


def _let_go(turns: Turns, release: contextlib.ExitStack) -> None:
    turns.close()
    with turns.alone():  # at the exit of the process, another thread may be in a step
        release.close()


def plan_cache(
    manifest: Manifest, kernels: Kernels, options: RunOptions, context: int, *, in_session: bool
) -> BudgetPlan:
    """Divide the budget for a sequence of up to ``context`` tokens; one in a session is of INT8 pages.

    Raises:
        BudgetError: it is too small.
    """
    return plan_budget(
        manifest.model.pages(manifest.page_size),
        kv_budget=options.kv_budget,
        context=context,
        run_pages=kernels.RUN_PAGES,
        mode=KVMode.INT8 if in_session else options.kv,
        inline=manifest.form == "inline",
        selective=attend_options(options.attend, manifest.form).selective,
        drops=options.allow_drop and options.offload is None and not in_session,
        windows=() if in_session else manifest.model.windows,
        chunk=options.prefill_chunk,
    )


def prepare_cache(
    manifest: Manifest,
    dense: Segments | InlineEngine,
    kernels: Kernels,
    options: RunOptions,
    machine: Machine,
    *,
    context: int,
    kept: Kept | None,
    turns: Turns,
    abandon: Callable[[], None],
) -> Prepared:
    """Divide the budget and make a cache for a sequence of up to ``context`` tokens.

    Args:
        kept: where the pages of the sequence are kept, if they are.
        turns: at the generator that it is for.
        abandon: lets the session go as the end of the process would.

    Raises:
        BudgetError: the budget is too small. StoreError: there is no room for pages on flash, or the object store refused.
            EngineMissing: a package for it is not installed. UsageError: the options contradict each other.
    """
    model = manifest.model
    spec = model.pages(manifest.page_size)
    attend = attend_options(options.attend, manifest.form)
    plan = plan_cache(manifest, kernels, options, context, in_session=kept is not None)
    with contextlib.ExitStack() as release:
        release.callback(return_free_memory)  # when all else is free
        store: PageStore | None = None
        if kept is not None and kept.read_only is None:
            store = kept.store
        elif kept is not None:
            storage = replace(options.storage, encrypt_offload=options.encrypt_offload or kept.encrypted)
            over = store = OverlaidStore(kept.store, lambda: open_offload(storage, spec, machine.open_medium()))
            release.callback(over.close)
            if not plan.fits:
                over.open()
        elif not plan.fits and (options.offload is not None or not options.allow_drop):
            store = open_offload(options.storage, spec, machine.open_medium())
            release.callback(store.close)
        cache_options = CacheOptions(
            budget_bytes=plan.arena_bytes,
            compress_at_seal=plan.compress_at_seal,
            allow_drop=options.allow_drop,
            policy=make_policy(options.policy),
            windows=model.windows,
            forget_unseen=kept is None,  # a session resumes any prompt that begins like it
            merge_layers=frozenset(at for at, window in enumerate(model.windows) if not (window or kept)),
        )
        cache = KVCache(spec, cache_options, kernels, store, max_pages=-(-context // spec.page_size))
        machine.watch(cache, plan, abandon)
        attender: Attender | None = None
        forward: Forward
        if isinstance(dense, Segments):
            attender = Attender(
                model,
                cache,
                kernels,
                threads=options.threads,
                executor=dense.engine.executor,
                max_tokens=options.prefill_chunk,
                piece_pages=plan.piece_pages,
                ring_pieces=plan.ring_pieces,
                attend=attend,
                machine=machine,
            )
            forward = SplitForward(dense.engine, dense.embedding, Rope(model.ropes), cache, attender, machine.meter)
        else:
            forward = InlineForward(dense, model, cache, manifest.io, machine.meter)
        governor = Governor(cache.manager, plan, context, options, machine, attender)
        release.callback(governor.close)
        if attender is not None:
            release.callback(attender.close)  # before the governor, whose store it may read from
        return Prepared(context, plan, cache, forward, governor, attender, release.pop_all(), turns)
