"""The plan: memory by tier, time, and flash, for one model, context and device.

Memory is divided by the runtime's own rules (:mod:`edgekv.runtime.pages.budget`), time comes from the device model
(:mod:`edgekv.device_profiles.speed`). The kernel works while flash is read ahead, so a step takes the longer of the two; taking a
page in costs the host time beside.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from edgekv.device_profiles import Compute, DeviceProfile, kv_budget
from edgekv.device_profiles.flash import SECONDS_PER_DAY, streamed_seconds, years_of_life
from edgekv.device_profiles.speed import paged_seconds, step_seconds
from edgekv.device_profiles.thermal import sustained_speed
from edgekv.device_profiles.work import StepWork, kv_bytes_per_token, step_work
from edgekv.errors import BudgetError
from edgekv.runtime.attention.select import share_limit
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.pages.budget import (
    PIECE_BYTES,
    RUNTIME_OVERHEAD_BYTES,
    BudgetPlan,
    held_pages,
    pieces_of,
    plan_budget,
)
from edgekv.runtime.pages.policy import RECENT_PAGES
from edgekv.tiers import KVMode, Tier

from .model import PlannedModel

#: Load after which a speed counts as sustained.
SUSTAINED_S = 600.0
#: Of the pages that a selective step wants, how many are in RAM when as many fit: 38-53 % measured (docs/flash.md).
HIT_RATE_WHEN_EQUAL = 0.4
#: How far a prediction may be off, by the weakest number that it stands on.
UNCERTAINTY = {"high": 0.15, "medium": 0.2, "low": 0.4}
#: INT8 pages are planned where fp16 ones fit, from this gain on: they change results a little.
WORTH_INT8 = 1.02


@dataclass(frozen=True)
class Workload:
    """What the device is used for: sequences of ``prompt`` tokens read and the rest of ``context`` written, one after another.

    ``wanted``: share of the pages that a step attends to under selective attention; None under exact attention. ``kv``: as for
    ``edgekv run``; None: ``auto``, or ``int8`` where that is faster.
    """

    context: int
    prompt: int
    hours_per_day: float = 1.0
    prefill_chunk: int = 256
    wanted: float | None = None
    kv_budget: int | None = None
    kv: KVMode | None = None

    def shortened(self, context: int) -> Workload:
        """Return the same with fewer tokens, as much of them prompt as now."""
        prompt = max(1, min(self.prompt, context * self.prompt // self.context))
        return dataclasses.replace(self, context=context, prompt=prompt)


@dataclass(frozen=True)
class Plan:
    """What would happen. Times in seconds, sizes in bytes. ``problem`` says why it does not fit.

    ``workload``: what was planned: it says which ``kv``, and is no longer than the model was made for.
    """

    profile: str
    model: PlannedModel
    workload: Workload
    problem: str | None
    kv_budget_bytes: int
    tokens_by_tier: dict[str, int]
    bytes_by_tier: dict[str, int]
    largest_exact: int
    largest_selective: int
    ttft_s: float
    decode_tokens_per_s: float
    sustained_tokens_per_s: float
    flash_bytes_per_day: float
    years_of_life: float
    bound_by: str
    uncertainty: float

    @property
    def fits(self) -> bool:
        """Whether the device runs it without being killed or paging."""
        return self.problem is None

    @property
    def resident(self) -> bool:
        """Whether keys and values stay in RAM."""
        return not self.bytes_by_tier.get(Tier.NAMES[Tier.COLD], 0)


@dataclass(frozen=True)
class _Split:
    """Pages by tier, all layers; ``passed`` were freed behind a window."""

    hot: int
    warm: int
    cold: int
    passed: int

    @classmethod
    def of(cls, model: PlannedModel, plan: BudgetPlan, context: int) -> _Split:
        """Divide the pages of ``context`` tokens as the page manager would: one open page per layer is HOT."""
        pages = model.pages
        total = held_pages(pages, model.geometry.windows, context, 1)
        passed = held_pages(pages, (), context, 1) - total
        open_pages = min(total, pages.n_layers)
        if plan.fits:
            hot = open_pages if plan.compress_at_seal else total
            return cls(hot, total - hot, 0, passed)
        frames = plan.arena_bytes // pages.frame_bytes
        warm = min(total - open_pages, 2 * max(0, frames - open_pages - 1))
        return cls(open_pages, warm, total - open_pages - warm, passed)

    @property
    def held(self) -> int:
        """Pages that are anywhere."""
        return self.hot + self.warm + self.cold

    @property
    def written(self) -> float:
        """Pages that went to flash so far: of those behind a window, as many in proportion as of those within."""
        return self.cold * (self.held + self.passed) / max(1, self.held)

    def share_cold(self) -> float:
        """Share of the pages that are on flash."""
        return self.cold / max(1, self.held)


class _Clock:
    """Predicts steps of one model on one device with one budget."""

    def __init__(self, model: PlannedModel, device: DeviceProfile, budget: BudgetPlan, workload: Workload) -> None:
        self._model, self._device, self._budget, self._workload = model, device, budget, workload
        self.rates: Compute = device.rates(model.engine, model.weights)
        pages = model.pages
        self._token_bytes = {
            compressed: kv_bytes_per_token(pages, compressed=compressed) for compressed in (False, True)
        }
        self._piece_bytes = min(PIECE_BYTES, max(budget.piece_pages * pages.record_bytes, pages.record_bytes))

    def work(self, n_tokens: int, context: int, logits: int = 1) -> StepWork:
        """Return the work of a step, the pages by the kind that they would be."""
        kind = self._budget.compress_at_seal or not self._budget.fits
        return step_work(
            self._model.geometry,
            n_tokens=n_tokens,
            context=int(context * self._wanted(context)) if n_tokens == 1 else context,
            bits_per_weight=self._model.bits_per_weight,
            kv_bytes_per_token=self._token_bytes[kind],
            fp16_cache=not kind,
            logits=logits,
        )

    def _wanted(self, context: int) -> float:
        """Return the share of the pages that a step of one token attends to."""
        n_pages = -(-context // self._model.page_size)
        if self._workload.wanted is None or not n_pages:
            return 1.0
        return min(1.0, share_limit(self._workload.wanted, n_pages, RECENT_PAGES) / n_pages)

    def fetch(self, context: int, *, decode: bool) -> tuple[float, float]:
        """Return what a step needs from flash: the drive's time, and the host's."""
        pages = self._model.pages
        split = _Split.of(self._model, self._budget, context)
        cold: float = split.cold
        wanted = self._wanted(context)
        if decode and wanted < 1 and cold:
            resident = 1.0 - split.share_cold()
            hits = min(1.0, HIT_RATE_WHEN_EQUAL * resident / wanted)
            cold = min(cold, wanted * split.held * (1.0 - hits))
        drive = streamed_seconds(self._device.flash, cold * pages.record_bytes, self._piece_bytes)
        pieces = pieces_of(cold, pages.n_layers, self._budget.piece_pages)
        return drive, cold * self.rates.page_fetch_s.value + pieces * self.rates.piece_fetch_s.value

    def decode_seconds(self, context: int, speed: float = 1.0) -> tuple[float, str]:
        """Return the time of one token at ``context``, and what bounds it."""
        parts = step_seconds(self.work(1, context), self.rates, speed)
        drive, host = self.fetch(context, decode=True)
        host /= speed
        shares = (
            ("weights", parts.dense),
            ("attention", parts.attention),
            ("overhead", parts.overhead),
            ("fetching pages", host),
        )
        busy = parts.total + host
        return (drive, "flash") if drive > busy else (busy, max(shares, key=_second)[0])

    def prompt_seconds(self, n_tokens: int) -> float:
        """Return the time until the first token of a prompt is there."""
        pages, chunk = self._model.pages, self._workload.prefill_chunk
        seconds, before = 0.0, 0.0
        for start in range(0, n_tokens, chunk):
            size = min(chunk, n_tokens - start)
            last = start + size == n_tokens
            compute = step_seconds(self.work(size, start, logits=1 if last else 0), self.rates).total
            gone = _Split.of(self._model, self._budget, start + size).written
            written = (gone - before) * pages.record_bytes / self._device.flash.write_bytes_per_s.value
            drive, host = self.fetch(start, decode=False)
            seconds += max(compute + host, drive) + written
            before = gone
        return seconds


def _second(pair: tuple[str, float]) -> float:
    return pair[1]


def make_plan(model: PlannedModel, device: DeviceProfile, workload: Workload) -> Plan:
    """Plan a workload.

    Raises:
        ProfileError: the profile has no numbers for the engine.
    """
    if workload.kv is None:
        auto, int8 = (
            make_plan(model, device, dataclasses.replace(workload, kv=kv)) for kv in (KVMode.AUTO, KVMode.INT8)
        )
        return int8 if int8.fits and int8.decode_tokens_per_s > WORTH_INT8 * auto.decode_tokens_per_s else auto
    pages, problem, asked = model.pages, None, workload.context
    if asked > model.geometry.max_context:
        workload = workload.shortened(model.geometry.max_context)
    kv = workload.kv or KVMode.AUTO
    budget_bytes = workload.kv_budget or 0
    try:
        if workload.kv_budget is None:
            budget_bytes = kv_budget(device, model.weights_bytes, RUNTIME_OVERHEAD_BYTES).kv_bytes
        budget = _divide(model, budget_bytes, workload, kv)
    except BudgetError as error:
        problem = str(error)
        budget = _divide(model, None, workload, kv)
    if problem is None and asked > workload.context:
        problem = f"the model was made for {workload.context} tokens, not {asked}; lower --context"
    clock = _Clock(model, device, budget, workload)
    split = _Split.of(model, budget, workload.context)
    if problem and device.memory.kill == "swap":
        touched = model.weights_bytes + split.hot * pages.hot_bytes + split.warm * pages.warm_bytes
        stall = paged_seconds(touched, device.memory.app_limit_bytes.value, device.flash)
    else:
        stall = float("inf") if problem else 0.0
    step, bound = clock.decode_seconds(workload.context)
    hot = sustained_speed(device.thermal, SUSTAINED_S)
    hot_step, _ = clock.decode_seconds(workload.context, hot)
    ttft = clock.prompt_seconds(workload.prompt) + stall * -(-workload.prompt // workload.prefill_chunk)
    generated = workload.context - workload.prompt
    sequence_s = ttft + generated * (step + stall)
    per_day = workload.hours_per_day * SECONDS_PER_DAY / 24 / sequence_s * split.written * pages.record_bytes
    return Plan(
        profile=device.name,
        model=model,
        workload=workload,
        problem=problem,
        kv_budget_bytes=budget_bytes if problem is None else 0,
        tokens_by_tier=_tokens(split, workload.context),
        bytes_by_tier=_by_tier(
            split.hot * pages.hot_bytes, split.warm * pages.warm_bytes, split.cold * pages.record_bytes
        ),
        largest_exact=_largest(model, budget_bytes, workload, wanted=1.0),
        largest_selective=_largest(model, budget_bytes, workload, wanted=workload.wanted or 0.25),
        ttft_s=ttft,
        decode_tokens_per_s=1 / (step + stall),
        sustained_tokens_per_s=1 / (hot_step + stall),
        flash_bytes_per_day=per_day if stall == 0 else 0.0,
        years_of_life=years_of_life(device.flash, per_day if stall == 0 else 0.0),
        bound_by="paging" if stall else bound,
        uncertainty=_uncertainty(clock.rates, device, flash=split.cold > 0),
    )


def _divide(model: PlannedModel, budget: int | None, workload: Workload, kv: KVMode) -> BudgetPlan:
    return plan_budget(
        model.pages,
        kv_budget=budget,
        context=workload.context,
        mode=kv,
        run_pages=load_kernels().RUN_PAGES,
        inline=model.form == "inline",
        selective=workload.wanted is not None,
        windows=model.geometry.windows,
        chunk=workload.prefill_chunk,
    )


def _tokens(split: _Split, context: int) -> dict[str, int]:
    """Return tokens by tier, as a mean over the layers; with those behind a window they sum to the context."""
    total = split.held + split.passed
    warm, cold, passed = (round(context * part / total) for part in (split.warm, split.cold, split.passed))
    return _by_tier(context - warm - cold - passed, warm, cold)


def _by_tier(hot: int, warm: int, cold: int) -> dict[str, int]:
    return {Tier.NAMES[tier]: count for tier, count in ((Tier.HOT, hot), (Tier.WARM, warm), (Tier.COLD, cold))}


def _largest(model: PlannedModel, budget: int, workload: Workload, wanted: float) -> int:
    """Return the largest context of which the share ``wanted`` of the pages stays in RAM, in whole pages; 0 for none."""
    pages, low = model.pages, 0
    high = model.geometry.max_context // model.page_size if budget > 0 else 0

    def stays(n_pages: int) -> bool:
        tried = dataclasses.replace(workload, context=n_pages * pages.page_size, wanted=wanted if wanted < 1 else None)
        try:
            divided = _divide(model, budget, tried, KVMode.AUTO)
        except BudgetError:
            return False
        return divided.fits or (
            1.0 - _Split.of(model, divided, tried.context).share_cold() >= wanted > 0 and wanted < 1
        )

    while low < high:  # both bounds in pages; what stays at one length stays at every shorter one
        middle = (low + high + 1) // 2
        low, high = (middle, high) if stays(middle) else (low, middle - 1)
    return low * pages.page_size


def _uncertainty(rates: Compute, device: DeviceProfile, *, flash: bool) -> float:
    used = [rates.weight_read_bytes_per_s, rates.kv_read_bytes_per_s, rates.gemm_ops_per_s]
    if flash:
        used.append(device.flash.read_bytes_per_s)
    return max(UNCERTAINTY[quantity.confidence] for quantity in used)
