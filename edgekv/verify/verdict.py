"""The verdict: what was measured, and a gate held against it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from edgekv.runtime.attention.select import SelectionStats

from .divergence import Summary
from .facts import Facts
from .gate import Finding, Gate, Limits, at_least, at_most
from .recall import Answers, TaskScore

#: Name of the row that the gate is held against.
MINE = "this configuration"


@dataclass(frozen=True)
class Identity:
    """Are the logits bit-identical to those of the same tier, resident.

    ``positions``: how many differ; ``promised``: edgekv promises that none does, ``why`` it does not otherwise.
    """

    promised: bool
    positions: int
    why: str = ""


@dataclass(frozen=True)
class Greedy:
    """Greedy generation after the text that was read in chunks; ``first_difference`` is None when all tokens agree."""

    prompt: int
    tokens: int
    first_difference: int | None


@dataclass(frozen=True)
class Row:
    """One line of the table: the configuration, or a baseline.

    ``selection``: what selective attention did, token by token; ``note``: why there are no numbers.
    """

    name: str
    ram_bytes: int
    flash_bytes: int
    pages_dropped: int
    all: Summary | None
    decode: Summary | None
    curve: list[tuple[int, float, float]]
    tasks: list[TaskScore]
    selection: SelectionStats | None = None
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """All that was measured. ``findings``: every limit of the gate; ``remarks``: what a reader should know besides."""

    bundle: Facts
    options: Facts
    text: dict[str, str | int]
    gate: str
    seed: int
    partial: bool
    identity: Identity
    greedy: Greedy
    rows: list[Row]
    reference_tasks: list[TaskScore]
    findings: list[Finding]
    remarks: list[str]

    @property
    def passed(self) -> bool:
        """No limit of the gate is exceeded."""
        return all(finding.passed for finding in self.findings)


def judge(gate: Gate, row: Row, identity: Identity, *, partial: bool) -> list[Finding]:
    """Hold every limit of the gate against what was measured."""
    limits = gate.partial if partial else gate.exact
    findings = []
    if gate.identity == "always" or (gate.identity == "promised" and identity.promised):
        what = "positions whose logits differ from those of the same tier without I/O"
        if identity.why:
            what += f" ({identity.why})"
        findings.append(at_most(what, 0.0, float(identity.positions)))
    for part, summary in (("whole text", row.all), ("token by token", row.decode)):
        if summary is not None:
            findings += hold(limits, summary, part)
    if limits.tasks is not None:
        findings += [
            at_least(f"{score.name}: share of the full cache's score", limits.tasks, score.of_full)
            for score in row.tasks
            if score.measurable
        ]
    return findings


def hold(limits: Limits, summary: Summary, part: str) -> list[Finding]:
    """Hold the limits on distributions against one summary."""
    change = summary.perplexity_change
    measured = {**asdict(summary), "perplexity_change": abs(change), "perplexity_rise": change}
    words = {
        "perplexity_change": "relative change of perplexity",
        "perplexity_rise": "relative rise of perplexity",
        "mean_kld": "mean KLD",
        "p99_kld": "99th percentile of KLD",
        "max_kld": "largest KLD",
        "stretch_kld": "largest mean KLD of 32 neighbours",
    }
    findings = [
        at_most(f"{word} ({part})", limit, measured[name])
        for name, word in words.items()
        if (limit := getattr(limits, name)) is not None
    ]
    if limits.top1 is not None:
        findings.append(at_least(f"top-1 agreement ({part})", limits.top1, summary.top1))
    return findings


def remarks(rows: list[Row], answers: Answers) -> list[str]:
    """Say which baselines the configuration does not beat, and which tasks say nothing, or less, about it."""
    said = []
    mine = rows[0]
    for row in rows[1:]:
        if row.all is None or mine.all is None:
            continue
        worse = []
        if not mine.all.mean_kld < row.all.mean_kld:
            worse.append(f"mean KLD {mine.all.mean_kld:.2g} against {row.all.mean_kld:.2g}")
        own, other = _total(mine.tasks), _total(row.tasks)
        if own is not None and other is not None and (own < other or own == other < 1.0):
            worse.append(f"tasks {own:.0%} against {other:.0%}")
        if worse:
            said.append(f"this configuration does not beat '{row.name}': {'; '.join(worse)}")
    said += [
        f"{score.name}: not measurable on this model (the full cache scores {score.score:.0%})"
        for score in answers.full
        if not score.measurable
    ]
    if answers.raised:
        said.append(
            f"questions about documents of up to {answers.raised} tokens were answered with more than this configuration's"
            " share: it would hold little but the pages that are always kept"
        )
    return said


def _total(scores: list[TaskScore]) -> float | None:
    counted = [score.score for score in scores if score.measurable]
    return sum(counted) / len(counted) if counted else None
