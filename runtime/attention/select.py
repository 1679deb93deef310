"""Selective attention: which pages a step attends to, and a certified bound on what it may have missed.

For each query head ``h`` and page ``p``, ``n(p) * exp(bound_hp)`` is an upper bound on the page's share of the softmax sum
(:mod:`edgekv.runtime.pages.bounds`). After the kernel ran, the sum over the attended tokens is known, so what was left out
holds at most ``U / (U + attended)`` of the mass, with ``U`` the sum of the bounds left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import UsageError
from edgekv.settings import AttendOptions, parse_attend
from edgekv.spec import ModelSpec
from edgekv.tiers import Tier

from ..kernels.interface import Kernels
from ..pages.bounds import Summaries
from ..pages.cache import KVCache
from ..pages.table import PageTable, offloaded

Float = NDArray[np.float32]
Double = NDArray[np.float64]
Mask = NDArray[np.bool_]


#: A share of the pages leaves at least so many to choose, beside those that are always taken.
LEAST_CHOSEN = 4


def share_limit(share: float, n_pages: int, recent: int) -> int:
    """Return how many of ``n_pages`` a share of them is, with ``recent`` sealed pages that are always taken.

    So are the first page and the open one: a share of a few pages would choose nothing.
    """
    return max(recent + 2 + LEAST_CHOSEN, round(share * n_pages))


@dataclass
class Choice:
    """What a step attends to in one layer. ``left_out`` [n_q_heads]: logarithm of the bound on the rest's softmax sum."""

    taken: Mask
    left_out: Double
    weights: Double
    order: NDArray[np.int64]
    slack: Float


class Selector:
    """Chooses pages: the pinned ones, then those with the largest likely share of softmax mass over all heads.

    What is certified rests on upper bounds alone. One per cache.

    Args:
        capacity: pages per layer that stay in RAM, the limit when the options name none.
        recent: sealed pages at the end that are always taken, as are the first page, the open one and marked ones.
    """

    def __init__(
        self,
        table: PageTable,
        summaries: Summaries,
        options: AttendOptions,
        *,
        scale: float,
        softcap: float,
        capacity: int,
        recent: int,
    ) -> None:
        self.options = options
        self.summaries = summaries
        self._table = table
        self._scale, self._softcap = scale, softcap
        self._capacity = capacity
        self._recent = recent
        self._guess = np.zeros(table.spec.n_layers, np.int64)

    def limit(self, n_pages: int) -> int:
        """Pages of a layer with ``n_pages`` that a step may attend to."""
        options = self.options
        if options.epsilon is not None:
            return n_pages
        if options.share is not None:
            return share_limit(options.share, n_pages, self._recent)
        return options.pages if options.pages is not None else self._capacity

    def selects(self, n_pages: int) -> bool:
        """Return whether a step of one token over so many pages leaves any out."""
        return (
            self.options.selective
            and n_pages > 1
            and (self.options.epsilon is not None or n_pages > self.limit(n_pages))
        )

    def choose(self, layer: int, q: Float, position: int, window: int) -> Choice:
        """Choose pages for one query per head, q [n_q_heads, head_dim] at ``position``."""
        table = self._table
        n_pages, page_size = table.n_pages(layer), table.spec.page_size
        refs, tiers = table.refs[layer, :n_pages], table.tier[layer, :n_pages]
        self._summarise(layer, n_pages)
        bounds, likely, slack = self.summaries.scores(layer, q, n_pages, self._scale)
        if self._softcap:  # it keeps order and bounds; pages of which nothing is known stay without a bound
            bounds, likely = (
                np.where(np.isinf(part), part, np.float32(self._softcap) * np.tanh(part / np.float32(self._softcap)))
                for part in (bounds, likely)
            )
        live = np.bitwise_count(refs["mask"]).sum(axis=1, dtype=np.int64)
        if window:
            live[refs["position"] + page_size <= position - window + 1] = 0
        with np.errstate(divide="ignore", invalid="ignore"):
            weights = bounds.astype(np.float64) + np.log(live)
        weights[:, live == 0] = -np.inf
        always = table.marked[layer, :n_pages] | np.isinf(bounds[0])
        always[0] = True
        always[int(table.n_slots[layer]) // page_size - self._recent :] = True
        always &= live > 0
        rank = np.where(always, np.inf, _shares(likely, live > 0).sum(axis=0))
        order = np.argsort(-rank, kind="stable")
        order = order[live[order] > 0]
        count = self.limit(n_pages)
        if self.options.epsilon is not None:
            count = int(self._guess[layer])
        return self._take(order, max(count, int(always.sum())), tiers, weights, slack)

    def extend(self, layer: int, choice: Choice, log_sum_exp: Float) -> Choice | None:
        """Return a choice that proves epsilon, given the attended sum [n_q_heads] of this one; None if this one does."""
        epsilon = self.options.epsilon
        if epsilon is None:
            return None
        allowed = np.log(epsilon / (1 - epsilon)) + log_sum_exp - choice.slack
        ordered = np.exp(np.minimum(choice.weights[:, choice.order] - allowed[:, None].astype(np.float64), 300.0))
        # What is left out when the first k pages are taken, relative to what may be: falls with k.
        rest = np.cumsum(ordered[:, ::-1], axis=1)[:, ::-1].max(axis=0)
        count = int(np.count_nonzero(rest > 1))
        self._guess[layer] = count + count // 8
        if self.missing(choice, log_sum_exp).max() <= epsilon:
            return None
        tiers = self._table.tier[layer, : len(choice.taken)]
        return self._take(
            choice.order, max(count, int(np.count_nonzero(choice.taken))), tiers, choice.weights, choice.slack
        )

    def missing(self, choice: Choice, log_sum_exp: Float) -> Double:
        """Return the certified bound [n_q_heads]: no head missed a larger part of its softmax mass."""
        attended = log_sum_exp.astype(np.float64) - choice.slack
        with np.errstate(over="ignore"):
            bound: Double = 1 / (1 + np.exp(attended - choice.left_out))
        return bound

    def _take(
        self, order: NDArray[np.int64], count: int, tiers: NDArray[np.uint8], weights: Double, slack: Float
    ) -> Choice:
        taken = np.zeros(len(tiers), bool)
        taken[order[:count]] = True
        rest = weights[:, ~taken | (tiers == Tier.DROPPED)]
        peak = rest.max(axis=1, initial=-np.inf, keepdims=True)
        peak = np.where(np.isneginf(peak), 0, peak)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            left_out = (peak + np.log(np.exp(rest - peak).sum(axis=1, keepdims=True)))[:, 0]
        left_out = np.where(np.isnan(left_out), np.inf, left_out)
        return Choice(taken, left_out, weights, order, slack)

    def _summarise(self, layer: int, n_pages: int) -> None:
        """Summarise the sealed pages in RAM that are not known yet."""
        table = self._table
        sealed = min(n_pages, int(table.n_slots[layer]) // table.spec.page_size)
        in_ram = table.tier[layer, :sealed] <= Tier.WARM
        missing = np.flatnonzero(in_ram & ~self.summaries.known[layer, :sealed]) if sealed else np.empty(0, np.int64)
        if missing.size:
            self.summaries.add(layer, missing, table.refs[layer, missing])


def _shares(scores: Float, live: Mask) -> Float:
    """Return each head's softmax [n_q_heads, n_pages] over the pages with a live slot."""
    known = np.where(live, scores, np.float32(-np.inf))
    peak = known.max(axis=1, initial=-1e30, keepdims=True)
    shares: Float = np.exp(known - peak)
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), np.float32(1e-30))
    return shares


def make_selector(model: ModelSpec, cache: KVCache, kernels: Kernels, options: AttendOptions) -> Selector:
    """Return a selector for a cache, which summarises its pages from now on."""
    manager, spec = cache.manager, cache.spec
    if manager.summaries is None:
        manager.summaries = Summaries(cache.table, kernels)
    # The open page of every layer takes a frame, one frame is to work with, and the rest hold two pages each.
    capacity = 2 * (manager.arena.n_frames - spec.n_layers - 1) // spec.n_layers + 1
    recent = manager.options.recent_pages
    return Selector(
        cache.table,
        manager.summaries,
        options,
        scale=model.softmax_scale,
        softcap=model.softcap,
        capacity=max(1, capacity),
        recent=recent,
    )


@dataclass(frozen=True)
class Spread:
    """The distribution of a number over the steps of a run."""

    mean: float
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarise one value or more."""
        return cls(float(np.mean(values)), *(float(x) for x in np.percentile(values, [50, 99, 100])))


@dataclass(frozen=True)
class SelectionStats:
    """What selective attention did, over the steps that left pages out. Pages are counted over all layers.

    ``missing_mean``, ``missing_max``: certified bounds on the softmax mass that a step missed, the mean over its layers and
    heads and the largest of them; ``fetched`` pages came from flash, ``hit`` ones were in RAM.
    """

    steps: int
    pages_per_step: float
    wanted_per_step: float
    hit_per_step: float
    fetched_per_step: float
    hit_rate: float
    missing_mean: Spread
    missing_max: Spread


class SelectionLog:
    """Collects :class:`SelectionStats`, layer by layer."""

    def __init__(self) -> None:
        self._step = -1
        self._pages: list[int] = [0, 0, 0, 0]
        self._bounds: list[list[float]] = []

    def count(
        self, step: int, tiers: NDArray[np.uint8], taken: NDArray[np.bool_], missing: NDArray[np.float64]
    ) -> None:
        """Add one layer: the tiers of its pages before the step, those taken, and the bound per head."""
        if step != self._step:
            self._step = step
            self._bounds.append([])
        self._bounds[-1].extend(missing.tolist())
        counted = (tiers < Tier.FREE, taken, taken & (tiers <= Tier.WARM), taken & offloaded(tiers))
        self._pages = [total + int(np.count_nonzero(mask)) for total, mask in zip(self._pages, counted, strict=True)]

    def summary(self) -> SelectionStats | None:
        """Return the distribution so far; None if no step left a page out."""
        steps = len(self._bounds)
        if not steps:
            return None
        pages, wanted, hit, fetched = self._pages
        return SelectionStats(
            steps,
            pages / steps,
            wanted / steps,
            hit / steps,
            fetched / steps,
            hit / wanted if wanted else 1.0,
            Spread.of([float(np.mean(bounds)) for bounds in self._bounds]),
            Spread.of([max(bounds) for bounds in self._bounds]),
        )


def attend_options(text: str, form: str) -> AttendOptions:
    """Return which pages a step attends to.

    Raises:
        UsageError: it is not understood, or the form of the bundle cannot do it.
    """
    attend = parse_attend(text)
    if attend.selective and form == "inline":
        raise UsageError(
            "the inline form takes every page in one call: export with --form split for --attend selective"
        )
    return attend
