"""Faults put in on purpose. A gate that lets one of them through is broken."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekv.contract import FORMS
from edgekv.runtime.generate import RunOptions
from edgekv.tiers import KVMode
from edgekv.verify.controls import Control, DroppedPage, FlippedBit, ShiftedRope, ShuffledSummaries, SwappedScales
from edgekv.verify.gate import load_gate
from edgekv.verify.judge import Settings, verify
from edgekv.verify.tasks import Suite
from edgekv.verify.verdict import Verdict
from tests.cases import seldom

Bundle = Callable[..., Path]

#: No questions, no baselines: what a control must fail is the comparison.
SHORT = Settings(tokens=640, decode=128, greedy=0, suite=Suite.none(), baselines=False)
PREFILL = 512


def judged(
    folder: Path, control: Control | None, gate: str = "standard", settings: Settings = SHORT, **options: object
) -> Verdict:
    run = RunOptions(**{"threads": 2, "kv": KVMode.INT8, **options})  # type: ignore[arg-type]
    return verify(folder, run, load_gate(gate), settings, control=control)


def failed(verdict: Verdict) -> list[str]:
    return [finding.what for finding in verdict.findings if not finding.passed]


CONTROLS: dict[str, Callable[[], Control]] = {
    "lowest bit of a value": FlippedBit,
    "lowest bit of a key, last layer": lambda: FlippedBit(layer=3, page=4, byte=0),
    "sign bit of a value": lambda: FlippedBit(layer=2, bit=7),
    "page dropped": DroppedPage,
    "first page dropped, last layer": lambda: DroppedPage(layer=3, page=0),
    "scales swapped": SwappedScales,
    "RoPE one ahead": lambda: ShiftedRope(start=PREFILL),
    "RoPE one behind": lambda: ShiftedRope(start=PREFILL, by=-1),
}


def controls() -> Iterator[Any]:
    """Yield each control with a form: one of each kind for every run, the others and one of the other form for slow ones."""
    every = {("split", name) for name in ("lowest bit of a value", "page dropped", "scales swapped")}
    more = ("lowest bit of a key, last layer", "first page dropped, last layer", "RoPE one behind")
    for name, form in itertools.product(CONTROLS, FORMS):
        often = name not in more and (form == "split" or name == "sign bit of a value")
        mark = pytest.mark.slow if often else pytest.mark.exhaustive
        yield pytest.param(name, form, marks=[] if (form, name) in every else mark)


@pytest.mark.parametrize(("name", "form"), list(controls()))
def test_the_standard_gate_fails_every_control(form: str, name: str, bundle: Bundle) -> None:
    assert failed(judged(bundle("demo", form), CONTROLS[name]()))


#: Enough pages that a quarter of them is a choice.
SELECTIVE = replace(
    SHORT, tokens=1280, suite=Suite(lengths=(1024,), depths=(0.25, 0.5, 0.75), keys=(), pairs=(), others=False)
)


@pytest.mark.parametrize(
    "systematic",
    [
        pytest.param(False, id="a fault of memory", marks=pytest.mark.slow),
        pytest.param(True, id="a fault of the code", marks=pytest.mark.slow),
    ],
)
def test_shuffled_summaries_fail_where_attention_is_selective(systematic: bool, bundle: Bundle) -> None:
    """In the inline form there are no summaries: it takes every page, and refuses selective attention."""
    control = ShuffledSummaries(systematic=systematic)
    verdict = judged(bundle("demo"), control, settings=SELECTIVE, attend="selective:25%")
    assert (verdict.identity.positions > 0) == (not systematic)
    assert any(what.startswith("passkey") for what in failed(verdict))


@pytest.mark.slow
def test_a_quarter_of_the_pages_passes_without_the_fault(bundle: Bundle) -> None:
    verdict = judged(bundle("demo"), None, settings=SELECTIVE, attend="selective:25%")
    assert failed(verdict) == []
    selection = verdict.rows[0].selection
    assert selection is not None
    assert selection.wanted_per_step < 0.3 * selection.pages_per_step


@pytest.mark.parametrize("gate", seldom(["strict", "standard"], but=["strict"]))
def test_the_same_run_without_a_fault_passes_both_named_gates(gate: str, bundle: Bundle) -> None:
    assert failed(judged(bundle("demo"), None, gate)) == []


def test_a_flipped_bit_on_flash_fails_although_it_hides_below_the_noise_of_int8(bundle: Bundle) -> None:
    verdict = judged(bundle("demo"), FlippedBit(layer=1), kv_budget="48%")
    assert verdict.rows[0].flash_bytes > 0
    [only] = failed(verdict)
    assert "differ from those of the same tier" in only


@pytest.mark.parametrize(
    "control",
    [
        pytest.param(SwappedScales(), marks=pytest.mark.slow),
        ShiftedRope(start=PREFILL),
    ],
    ids=lambda control: control.name,
)
def test_a_fault_of_the_code_is_found_by_the_comparison_with_fp16_alone(control: Control, bundle: Bundle) -> None:
    """The resident run of the same tier has the fault as well: identity holds, and must not be enough."""
    verdict = judged(bundle("demo"), control)
    assert verdict.identity.positions == 0
    assert failed(verdict)


@pytest.mark.slow
def test_an_fp16_run_is_held_against_the_reference_to_the_bit(bundle: Bundle) -> None:
    assert failed(judged(bundle("demo"), None, "strict", kv=KVMode.FP16)) == []
    assert failed(judged(bundle("demo"), FlippedBit(), "strict", kv=KVMode.FP16))
