"""A bundle against the checkpoint that it was made from: what weights and cache cost together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgekv.errors import CheckpointError, UsageError
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.settings import parse_attend

from .divergence import Divergence, Summary
from .facts import Facts, bundle_facts, option_facts, shorter_than_asked, text_facts
from .gate import Finding, Gate
from .judge import Settings, default_text
from .lanes import Lane, plan_schedule
from .verdict import hold

Advance = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SourceVerdict:
    """What was measured. ``all``: the whole text; ``decode``: what went token by token. ``findings``: every limit of the gate."""

    bundle: Facts
    options: Facts
    text: dict[str, str | int]
    gate: str
    all: Summary
    decode: Summary
    curve: list[tuple[int, float, float]]
    findings: list[Finding]
    remarks: list[str]

    @property
    def passed(self) -> bool:
        """No limit of the gate is exceeded."""
        return all(finding.passed for finding in self.findings)


def verify_source(
    folder: str | Path,
    source: str | Path,
    options: RunOptions,
    gate: Gate,
    settings: Settings,
    *,
    text: str | None = None,
    advance: Advance = lambda phase, done, total: None,
) -> SourceVerdict:
    """Compare a configuration of a bundle with its checkpoint, which reads the same text in float32, layer by layer.

    Args:
        source: what was exported: see :func:`edgekv.export.export_model`.
        options: the configuration; ``context`` and ``prefill_chunk`` are set here.
        settings: of these, ``tokens`` and ``decode``.
        text: what is read; None is :func:`edgekv.verify.judge.default_text`.
        advance: called with (what is being measured, steps done, steps in all).

    Raises:
        UsageError: text too short, another checkpoint, or a gate that asks for what is not measured here. CheckpointError: it
            cannot be read. EngineMissing: what reads it is not installed. EdgeKVError: a run failed.
    """
    if gate.identity != "never" or gate.exact.tasks is not None or gate.partial.tasks is not None:
        raise UsageError(
            f"the gate {gate.name!r} asks for identical bits or for right answers, and --reference compares distributions; use"
            ' --gate weights, or a file with identity = "never" and no tasks'
        )
    from edgekv.export.open_source import missing, opened_source

    text = default_text() if text is None else text
    with Generator.open(folder, RunOptions(threads=options.threads)) as parent:
        manifest = parent.manifest
        model = manifest.model
        tokens = parent.text.encode(text)
        schedule = plan_schedule(len(tokens), settings.tokens, settings.decode, model.max_context)
        available, tokens = len(tokens), tokens[: schedule.n_tokens]
        with contextlib.ExitStack() as stack:
            try:
                from edgekv.export.walk import SourceRun

                checkpoint = stack.enter_context(opened_source(source, model.max_context))
            except ImportError as error:
                raise missing(error) from error
            except CheckpointError:
                raise
            except UsageError as error:  # the bundle's own context cannot be had
                raise UsageError(
                    f"{folder} was not made from {source}, which is for texts of another length; give --reference what was"
                    " exported"
                ) from error
            advance("reading the checkpoint", 0, 1)
            if checkpoint.sha256() != manifest.source_sha256:
                raise UsageError(
                    f"{folder} was not made from {source}: the weights are others; give --reference what was exported"
                )
            same = replace(checkpoint.config.model, eos_token_ids=manifest.model.eos_token_ids)
            if same != manifest.model:
                raise UsageError(
                    f"{folder} was not made from {source}: the weights are the same, the configuration is another;"
                    " give --reference what was exported"
                )
            advance("reading the checkpoint", 1, 1)
            reference = SourceRun(
                checkpoint, tokens, lambda done, total: advance("reading the text with the checkpoint", done, total)
            )
        lane = Lane(parent, options, schedule.n_tokens)
        divergence = Divergence(len(tokens))
        for start, stop in schedule.steps():
            targets = np.asarray(tokens[start + 1 : stop + 1], np.int64)
            divergence.add(start, reference.logits(start, stop), lane.score(tokens, start, stop), targets)
            advance("reading the text with the bundle", stop, len(tokens))
        partial = lane.pages_dropped > 0 or parse_attend(options.attend).selective
        lane.close()
        whole, decode = divergence.summary(), divergence.summary(schedule.prefill)
        limits = gate.partial if partial else gate.exact
        # A few hundred tokens say little about perplexity.
        shorter = replace(limits, perplexity_rise=None, perplexity_change=None)
        return SourceVerdict(
            bundle=bundle_facts(manifest),
            options=option_facts(options),
            text=text_facts(text, schedule),
            gate=gate.name,
            all=whole,
            decode=decode,
            curve=divergence.curve(),
            findings=[*hold(limits, whole, "whole text"), *hold(shorter, decode, "token by token")],
            remarks=shorter_than_asked(schedule, settings.tokens, available),
        )
