"""How a KV budget is divided: staging, arena, and whether pages are compressed as they fill."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgekv.errors import BudgetError
from edgekv.settings import KV_BUDGET
from edgekv.sizes import format_bytes
from edgekv.spec import RUNTIME_OVERHEAD_BYTES as RUNTIME_OVERHEAD_BYTES
from edgekv.spec import PageSpec
from edgekv.tiers import KVMode

from ..storage.ring import LEAST_PIECES, LEAST_PIECES_SELECTIVE, RING_PIECES
from .bounds import summary_bytes
from .manager import PageManager
from .policy import PINNED_PAGES, SPARE_PAGES

#: Reads of this size keep flash near its sequential rate, which levels off between 256 KiB and 1 MiB.
PIECE_BYTES = 640 * 1024
#: Pieces are that large as soon as a quarter of the budget holds so many of them: half as large and twice as many took a token
#: of 1,024 to 2,048 tokens 9 to 20 % longer.
ENOUGH_PIECES = 5


@dataclass(frozen=True)
class BudgetPlan:
    """The parts of a budget; ``arena_bytes + staging_bytes <= budget_bytes``. Staging includes page summaries.

    ``fits``: the whole context fits the arena, so that no page needs to leave RAM. ``piece_pages``: pages that are
    read from flash at a time; the staging ring, if there is one, holds ``ring_pieces`` of them, in a quarter of the budget
    where that is enough.
    """

    budget_bytes: int
    arena_bytes: int
    staging_bytes: int
    compress_at_seal: bool
    fits: bool
    piece_pages: int = 0
    ring_pieces: int = LEAST_PIECES_SELECTIVE


def pieces_of(cold_pages: float, n_layers: int, piece_pages: int) -> int:
    """Return in how many pieces a step reads so many pages of all layers from flash; a piece is of one layer."""
    return n_layers * math.ceil(cold_pages / n_layers / max(piece_pages, 1))


def resolve_budget(kv_budget: int | str | None, spec: PageSpec, context: int) -> int | None:
    """Return a budget in bytes; ``"25%"`` is a share of the fp16 cache of ``context`` tokens.

    Raises:
        UsageError: it is not a size or a share.
    """
    if kv_budget is None or isinstance(kv_budget, int):
        return kv_budget
    return KV_BUDGET.size_bytes(kv_budget, spec.fp16_cache_bytes(context))


def held_pages(spec: PageSpec, windows: tuple[int, ...], context: int, chunk: int) -> int:
    """Return how many pages of all layers a cache of ``context`` tokens holds at the most.

    Args:
        windows: per layer, how many tokens a token sees, 0 for all; pages that none to come sees are freed. Empty: none are.
        chunk: new tokens of a step.
    """
    pages = -(-context // spec.page_size)
    if not windows:
        return spec.n_layers * pages
    spans = (
        (window - 1 + chunk + spec.page_size - 1) // spec.page_size + 1 + SPARE_PAGES for window in windows if window
    )
    return windows.count(0) * pages + sum(min(pages, span) for span in spans)


def plan_budget(
    spec: PageSpec,
    *,
    kv_budget: int | str | None,
    context: int,
    mode: KVMode,
    run_pages: int,
    inline: bool = False,
    selective: bool = False,
    drops: bool = False,
    windows: tuple[int, ...] = (),
    chunk: int = 1,
) -> BudgetPlan:
    """Divide a budget for a sequence of up to ``context`` tokens.

    Args:
        run_pages: pages that the kernel takes at a time.
        selective: selective attention, which keeps a summary of every page in RAM.
        drops: pages that do not fit are forgotten: none is read back, so there is no staging ring.
        windows, chunk: as for :func:`held_pages`; without windows every page is held.

    Raises:
        BudgetError: it is below what the run needs at the least; the message says how much that is.
    """
    held = held_pages(spec, windows, context, chunk)
    whole_fp16 = held * spec.frame_bytes
    # Sealed pages in pairs per frame, one open page per layer, one frame to work with.
    whole_int8 = (held + 1) // 2 * spec.frame_bytes + (spec.n_layers + 1) * spec.frame_bytes
    budget = resolve_budget(kv_budget, spec, context)
    summaries = summary_bytes(spec, -(-context // spec.page_size)) if selective else 0
    if budget is None:
        compress = mode == KVMode.INT8
        arena = max(whole_int8 if compress else whole_fp16, PageManager.least_bytes(spec))
        return BudgetPlan(arena + summaries, arena, 0, compress, True, *staging_ring(spec, arena, run_pages, selective))
    compress = mode == KVMode.INT8 or (mode == KVMode.AUTO and whole_fp16 > budget)
    whole = max(whole_int8 if compress else whole_fp16, PageManager.least_bytes(spec))
    if whole + summaries <= budget:
        return BudgetPlan(budget, whole, 0, compress, True, *staging_ring(spec, budget, run_pages, selective))
    piece_pages, ring_pieces = staging_ring(spec, budget, run_pages, selective)
    staging_bytes = summaries + (0 if drops else ring_pieces * piece_pages * spec.record_bytes)
    needed = PageManager.least_bytes(spec, PINNED_PAGES if drops else 0) + staging_bytes
    gathered = 2 * held * spec.warm_bytes if inline else 0
    if inline and budget < needed + gathered:
        raise BudgetError(
            f"the inline form takes every page of {context} tokens in one call: {format_bytes(needed + gathered)}, and the KV"
            f" budget is {format_bytes(budget)}; export with --form split, which needs {format_bytes(needed)}, or raise"
            " --kv-budget"
        )
    if budget < needed:
        besides = f"{PINNED_PAGES} that are never dropped" if drops else "a staging ring"
        raise BudgetError(
            f"a KV budget of {format_bytes(budget)} is too small: {spec.n_layers} layers need one open page of"
            f" {spec.page_size} tokens each, one to work with and {besides}, {format_bytes(needed)} in all;"
            " raise --kv-budget, or export with a smaller --page-size"
        )
    return BudgetPlan(
        budget, budget - staging_bytes - gathered, staging_bytes, compress, False, piece_pages, ring_pieces
    )


def staging_ring(spec: PageSpec, budget_bytes: int, run_pages: int, selective: bool) -> tuple[int, int]:
    """Return the pages of a piece, and the pieces of the staging ring."""
    piece_bytes = min(PIECE_BYTES, budget_bytes // (4 * ENOUGH_PIECES))
    piece_pages = max(1, piece_bytes // (spec.record_bytes * run_pages)) * run_pages
    least = LEAST_PIECES_SELECTIVE if selective else LEAST_PIECES
    return piece_pages, max(least, min(RING_PIECES, budget_bytes // 4 // (piece_pages * spec.record_bytes)))
