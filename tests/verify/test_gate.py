"""Gates and the numbers they are held against."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from edgekv.errors import UsageError
from edgekv.verify.divergence import Divergence
from edgekv.verify.gate import at_least, at_most, load_gate, parse_gate
from edgekv.verify.lanes import plan_schedule
from edgekv.verify.verdict import hold


def compared(reference: np.ndarray, logits: np.ndarray) -> Divergence:
    divergence = Divergence(len(reference))
    divergence.add(0, reference, logits, np.zeros(len(reference) - 1, np.int64))
    return divergence


def test_divergence_is_that_of_the_textbook() -> None:
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]], np.float32))
    logits = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]], np.float32)) + 3
    summary = compared(reference, logits).summary()
    assert summary.max_kld == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2), rel=1e-6)
    assert summary.mean_kld == pytest.approx(summary.max_kld / 2, rel=1e-6)
    assert summary.top1 == 0.5
    assert summary.perplexity_change == pytest.approx(1.0, rel=1e-6)  # 4 against 2


def test_a_fault_in_few_neighbours_shows_in_the_stretch_and_not_in_the_mean() -> None:
    reference = np.zeros((3200, 4), np.float32)
    logits = reference.copy()
    logits[1600:1632, 0] = 2.0
    summary = compared(reference, logits).summary()
    assert summary.stretch_kld > 90 * summary.mean_kld


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_no_number_passes_no_limit(bad: float) -> None:
    reference = np.zeros((64, 4), np.float32)
    logits = reference.copy()
    logits[7, 1] = bad
    findings = hold(load_gate("standard").exact, compared(reference, logits).summary(), "")
    assert not all(finding.passed for finding in findings)
    assert not at_most("x", 1.0, float("nan")).passed
    assert not at_least("x", 0.0, float("nan")).passed


def test_the_named_gates_hold_what_the_documentation_says() -> None:
    strict, standard = load_gate("strict"), load_gate("standard")
    assert (strict.identity, standard.identity) == ("always", "promised")
    exact = standard.exact
    assert (exact.perplexity_change, exact.mean_kld, exact.top1, exact.tasks) == (0.005, 0.005, 0.98, 0.95)
    assert (standard.partial.perplexity_rise, standard.partial.tasks) == (0.02, 0.95)
    assert standard.partial.perplexity_change is None


def test_a_gate_can_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('identity = "never"\n[exact]\nmean_kld = 0.001\n', encoding="utf-8")
    gate = load_gate(str(path))
    assert (gate.name, gate.identity, gate.exact.mean_kld, gate.exact.top1) == ("mine", "never", 0.001, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[exact]\nmean_kdl = 1\n", 'exact.mean_kdl is not a field; did you mean "mean_kld"?'),
        ("[exact]\ntop1 = 'high'\n", "exact.top1 is 'high'; it must be a number"),
        ("[exact]\nmean_kld = nan\n", "exact.mean_kld is nan; it must be a number"),
        ("[strict]\n", "strict is not a field"),
        ("identity = 'maybe'\n", "identity is 'maybe'; it must be one of always, promised, never"),
        ("identity = 'never'\n", "limits nothing"),
        ("exact = 3\n", "must be a table"),
        ("[exact\n", "it is not valid TOML"),
    ],
)
def test_a_gate_that_says_nothing_sensible_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        parse_gate("mine", text.encode())


def test_a_short_text_is_refused_with_the_numbers() -> None:
    with pytest.raises(UsageError, match="100 tokens; verify needs 128"):
        plan_schedule(100, 4096, 1024, 8192)
