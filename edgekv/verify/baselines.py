"""What a configuration must beat to be worth its trouble: the simple ways to use the same bytes of RAM."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from edgekv.errors import BudgetError
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.pages.budget import BudgetPlan
from edgekv.runtime.pages.manager import PageManager
from edgekv.runtime.pages.policy import PINNED_PAGES
from edgekv.tiers import KVMode

from .lanes import CHUNK, Lane, ShortLane, reference_options, resident_options

#: Fewest tokens that a shorter context is tried with.
LEAST_WINDOW = 2 * CHUNK


@dataclass(frozen=True)
class Baseline:
    """One simple way. ``policy``: drop pages by it, all that do not fit; otherwise a shorter context in ``kv`` pages."""

    name: str
    policy: str | None = None
    kv: KVMode = KVMode.FP16

    def open(self, parent: Generator, options: RunOptions, context: int, budget_bytes: int) -> Lane | str:
        """Return a lane for ``context`` tokens in ``budget_bytes`` of RAM, or why there is none."""
        if self.policy is not None:
            return self._dropping(parent, options, context, budget_bytes)
        spec = parent.manifest.model.pages(parent.manifest.page_size)
        window = window_tokens(parent, self.kv, budget_bytes, context)
        if window >= context:
            return Lane(parent, resident_options(options), context)
        if window < LEAST_WINDOW:
            return f"the budget holds {max(window, 0)} tokens so, too few to run"
        base = reference_options(options) if self.kv == KVMode.FP16 else resident_options(options)
        return ShortLane(parent, base, window // spec.page_size * spec.page_size)

    def _dropping(self, parent: Generator, options: RunOptions, context: int, budget_bytes: int) -> Lane | str:
        assert self.policy is not None
        kv = KVMode.INT8 if options.kv == KVMode.AUTO else options.kv
        lane = Lane(
            parent,
            dataclasses.replace(
                options,
                policy=self.policy,
                kv=kv,
                kv_budget=budget_bytes,
                allow_drop=True,
                offload=None,
                flash_limit=None,
            ),
            context,
        )
        try:
            plan: BudgetPlan = lane.plan
        except BudgetError as error:
            return str(error)
        if plan.fits or plan.arena_bytes < least_arena_bytes(parent):
            lane.close()
            return "the budget holds every page, nothing would be dropped" if plan.fits else "the budget is too small"
        return lane


def all_baselines() -> list[Baseline]:
    """Return the baselines that every table has."""
    return [
        Baseline("fp16, shorter context"),
        Baseline("INT8, what fits", kv=KVMode.INT8),
        Baseline("first and recent pages", policy="window"),
        Baseline("random pages", policy="random"),
    ]


def least_arena_bytes(parent: Generator) -> int:
    """Return the arena below which dropping may find nothing but pinned pages: the first, the recent, the open one."""
    spec = parent.manifest.model.pages(parent.manifest.page_size)
    return PageManager.least_bytes(spec, PINNED_PAGES)


def window_tokens(parent: Generator, kv: KVMode, budget_bytes: int, context: int) -> int:
    """Return how many tokens of full attention fit a budget, all in RAM."""
    spec = parent.manifest.model.pages(parent.manifest.page_size)
    page_bytes = spec.n_layers * spec.frame_bytes
    if kv == KVMode.FP16:
        pages = budget_bytes // page_bytes
    else:
        # Two sealed pages per frame, and one open page per layer with a frame to work with.
        pages = (budget_bytes - (spec.n_layers + 1) * spec.frame_bytes) * 2 // page_bytes
    return min(int(pages) * spec.page_size, context)
