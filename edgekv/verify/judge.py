"""The judge: one configuration of a bundle against the full fp16 cache on the same graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import numpy as np

from edgekv.runtime.engines.base import Float
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.settings import parse_attend

from .baselines import Baseline, all_baselines
from .controls import Control
from .divergence import Divergence
from .facts import bundle_facts, option_facts, shorter_than_asked, text_facts
from .gate import Gate
from .lanes import Lane, Schedule, ShortLane, greedy, plan_schedule, reference_options, resident_options, run_lanes
from .recall import Answers, run_tasks
from .tasks import Suite
from .verdict import MINE, Greedy, Identity, Row, Verdict, judge, remarks

Advance = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How much is measured. ``tokens`` of the text, the last ``decode`` of them one by one; ``greedy`` tokens
    are generated, not more than ``decode``; 0 is none.
    """

    tokens: int = 4096
    decode: int = 512
    greedy: int = 256
    suite: Suite = field(default_factory=Suite)
    baselines: bool = True
    seed: int = 0


QUICK = Settings(tokens=640, decode=128, greedy=24, suite=Suite.quick(), baselines=False)


def default_text() -> str:
    """Return the text that ships with edgekv; the demo model has not seen it."""
    return (resources.files("edgekv.verify") / "default_text.txt").read_text(encoding="utf-8")


def verify(
    folder: str | Path,
    options: RunOptions,
    gate: Gate,
    settings: Settings = QUICK,
    *,
    text: str | None = None,
    control: Control | None = None,
    advance: Advance = lambda phase, done, total: None,
) -> Verdict:
    """Measure a configuration and hold the gate against it.

    Args:
        options: the configuration; ``context`` and ``prefill_chunk`` are set here.
        text: what is read; None is :func:`default_text`.
        control: a fault to put in, to see the gate fail.
        advance: called with (what is being measured, tokens done, tokens in all).

    Raises:
        UsageError: text too short, or options that do not fit the bundle. EdgeKVError: a run failed.
    """
    text = default_text() if text is None else text
    with Generator.open(folder, RunOptions(threads=options.threads)) as parent:
        tokens = parent.text.encode(text)
        model = parent.manifest.model
        schedule = plan_schedule(len(tokens), settings.tokens, settings.decode, model.max_context)
        available, tokens = len(tokens), tokens[: schedule.n_tokens]
        measured = _Measured(parent, options, schedule, tokens, text, settings, control, advance)
        measured.fidelity()
        measured.remarks += shorter_than_asked(schedule, settings.tokens, available)
        told = measured.greedy()
        answers = measured.tasks()
        scores = dict(zip(measured.with_numbers, answers.others, strict=True))
        rows = [replace(row, tasks=scores.get(row.name, [])) for row in measured.rows]
        partial = rows[0].pages_dropped > 0 or parse_attend(options.attend).selective
        findings = judge(gate, rows[0], measured.identity, partial=partial)
        return Verdict(
            bundle=bundle_facts(parent.manifest),
            options=option_facts(options),
            text=text_facts(text, schedule),
            gate=gate.name,
            seed=settings.seed,
            partial=partial,
            identity=measured.identity,
            greedy=told,
            rows=rows,
            reference_tasks=answers.full,
            findings=findings,
            remarks=[*measured.remarks, *remarks(rows, answers)],
        )


class _Measured:
    """The measurements of one call of :func:`verify`."""

    def __init__(
        self,
        parent: Generator,
        options: RunOptions,
        schedule: Schedule,
        tokens: list[int],
        text: str,
        settings: Settings,
        control: Control | None,
        advance: Advance,
    ) -> None:
        self.parent, self.options, self.schedule, self.tokens = parent, options, schedule, tokens
        self.text, self.settings, self.control, self.advance = text, settings, control, advance
        self.context = schedule.n_tokens
        self.rows: list[Row] = []
        self.remarks: list[str] = []
        self.identity = Identity(False, 0)
        self.baselines: list[Baseline] = []
        self.spec = parent.manifest.model.pages(parent.manifest.page_size)
        self.share: float | None = None  # of the fp16 cache, when the configuration has a budget

    def _lane(self, options: RunOptions, *, control: Control | None = None) -> Lane:
        return Lane(self.parent, options, self.context, control=control)

    def fidelity(self) -> None:
        """Feed the text to the reference, the configuration, the same tier in RAM, and the baselines."""
        candidate = self._lane(self.options, control=self.control)
        plan = candidate.plan
        if self.options.kv_budget is not None:
            self.share = plan.budget_bytes / self.spec.fp16_cache_bytes(self.context)
        reference = self._lane(reference_options(self.options))
        twin = None
        if plan.compress_at_seal:
            systematic = self.control if self.control is not None and self.control.systematic else None
            twin = self._lane(resident_options(self.options), control=systematic)
        others: list[Lane | str] = []
        if self.settings.baselines and (plan.compress_at_seal or not plan.fits):
            self.baselines = all_baselines()
            others = [b.open(self.parent, self.options, self.context, plan.budget_bytes) for b in self.baselines]
            if plan.fits and not parse_attend(self.options.attend).selective:
                others = [
                    lane if isinstance(lane, (ShortLane, str)) else "this is the configuration" for lane in others
                ]
        if plan.fits and not plan.compress_at_seal and not parse_attend(self.options.attend).selective:
            self.remarks.append(
                "this configuration is the full fp16 cache: nothing is compressed, offloaded or left out"
            )
        lanes = [reference, candidate, *([twin] if twin else []), *(lane for lane in others if isinstance(lane, Lane))]
        compared = [Divergence(len(self.tokens)) for _ in lanes]
        differing = 0
        done = 0

        def compare(start: int, logits: list[Float]) -> None:
            nonlocal differing, done
            targets = np.asarray(self.tokens[start + 1 : start + 1 + len(logits[0])], np.int64)
            for lane, divergence in zip(logits[1:], compared[1:], strict=True):
                divergence.add(start, logits[0], lane, targets)
            other = logits[2] if twin else logits[0]
            differing += int((logits[1].view(np.uint32) != other.view(np.uint32)).any(axis=1).sum())
            done += len(logits[0])
            self.advance(f"reading the text ({len(lanes)} runs side by side)", done, len(self.tokens))

        run_lanes(lanes, self.tokens, self.schedule, compare)
        dropped = candidate.pages_dropped
        promised = dropped == 0 and (plan.compress_at_seal or plan.fits)
        why = "" if promised else "pages were dropped" if dropped else "pages were compressed when memory ran out"
        self.identity = Identity(promised, differing, why)
        self.rows = [self._row(MINE, candidate, compared[1])]
        for baseline, lane in zip(self.baselines, others, strict=True):
            if isinstance(lane, str):
                self.rows.append(Row(baseline.name, 0, 0, 0, None, None, [], [], note=lane))
            else:
                self.rows.append(self._row(baseline.name, lane, compared[lanes.index(lane)]))
        for lane in lanes:
            lane.close()

    def _row(self, name: str, lane: Lane, divergence: Divergence) -> Row:
        ram, flash = lane.bytes_held()
        whole, decode = divergence.summary(), divergence.summary(self.schedule.prefill)
        return Row(name, ram, flash, lane.pages_dropped, whole, decode, divergence.curve(), [], lane.selection)

    def greedy(self) -> Greedy:
        """Generate greedily with the full cache and with the configuration."""
        prompt = self.tokens[: self.schedule.prefill]
        count = min(self.settings.greedy, self.context - len(prompt))
        if not count:
            return Greedy(len(prompt), 0, None)
        said, done = [], 0

        def step(tokens: int) -> None:
            nonlocal done
            done += tokens
            self.advance("generating", done, 2 * count)

        for options, control in ((reference_options(self.options), None), (self.options, self.control)):
            lane = self._lane(options, control=control)
            said.append(greedy(lane, prompt, count, step))
            lane.close()
        different = [i for i, (a, b) in enumerate(zip(*said, strict=True)) if a != b]
        return Greedy(len(prompt), count, different[0] if different else None)

    @property
    def with_numbers(self) -> list[str]:
        """Names of the rows that were run."""
        return [row.name for row in self.rows if row.all is not None]

    def tasks(self) -> Answers:
        """Run the retrieval tasks with the full cache, the configuration and the baselines that have numbers."""
        baselines = [baseline for baseline in self.baselines if baseline.name in self.with_numbers]
        settings = self.settings
        return run_tasks(
            self.parent, self.options, baselines, settings.suite, self.text, self.share, settings.seed, self.control,
            self.advance,
        )  # fmt: skip
