"""Whole verdicts on the bundled model: what passes, what is reported, and that a report is the same twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgekv.runtime.generate import RunOptions
from edgekv.tiers import KVMode
from edgekv.verify.gate import load_gate
from edgekv.verify.judge import QUICK, Settings, verify
from edgekv.verify.other_codecs import EmulatedCodec
from edgekv.verify.report import to_json
from edgekv.verify.tasks import Suite
from edgekv.verify.verdict import Verdict, hold
from tests.checkpoints import make_outlier_checkpoint

Bundle = Callable[..., Path]

INT8 = RunOptions(threads=2, kv=KVMode.INT8)
STANDARD = load_gate("standard")
#: Seconds: a short text, no questions.
TINY = Settings(tokens=320, decode=96, greedy=8, suite=Suite.none(), baselines=False)


@pytest.mark.parametrize(
    ("engine", "form"),
    [
        pytest.param("onnx", "split", marks=pytest.mark.slow),
        pytest.param("onnx", "inline", marks=pytest.mark.slow),
        pytest.param("executorch", "split", marks=pytest.mark.slow),
        pytest.param("executorch", "inline", marks=pytest.mark.slow),
    ],
)
def test_the_bundled_model_passes_the_quick_gate(engine: str, form: str, bundle: Bundle) -> None:
    if engine == "executorch":
        pytest.importorskip("executorch")
    verdict = verify(bundle("demo", form, engine=engine), INT8, STANDARD, QUICK)
    assert [str(finding) for finding in verdict.findings if not finding.passed] == []
    assert verdict.rows[0].tasks, "the full cache answers the questions, so the configuration was asked too"
    assert 0 < verdict.rows[0].decode.mean_kld < 1e-3  # type: ignore[union-attr]
    assert verdict.identity.positions == 0


@pytest.mark.slow
def test_equal_seeds_give_the_same_report_to_the_byte(bundle: Bundle) -> None:
    settings = replace(TINY, suite=Suite(lengths=(256,), depths=(0.5,), keys=(), pairs=(2,), others=False))
    options = replace(INT8, kv_budget="60%")
    first, second = (verify(bundle("demo"), options, STANDARD, settings) for _ in range(2))
    assert json.dumps(to_json(first)) == json.dumps(to_json(second))
    other = to_json(verify(bundle("demo"), options, STANDARD, replace(settings, seed=1)))
    assert other["rows"][0]["whole_text"] == to_json(first)["rows"][0]["whole_text"], "a seed is for the tasks"


def test_pages_on_flash_change_no_bit(bundle: Bundle) -> None:
    verdict = verify(bundle("demo"), replace(INT8, kv_budget="60%"), load_gate("strict"), TINY)
    assert verdict.passed
    assert verdict.rows[0].flash_bytes > 0


def test_dropping_fails_strict_and_says_that_it_beats_no_equal(bundle: Bundle) -> None:
    options = replace(INT8, kv_budget="45%", allow_drop=True, policy="random")
    settings = replace(TINY, tokens=640, decode=64, baselines=True)
    verdict = verify(bundle("demo"), options, load_gate("strict"), settings)
    assert verdict.partial
    assert not verdict.passed
    assert "pages were dropped" in verdict.findings[0].what
    names = [row.name for row in verdict.rows]
    assert names[1:] == ["fp16, shorter context", "INT8, what fits", "first and recent pages", "random pages"]
    assert all(row.all is not None for row in verdict.rows), [row.note for row in verdict.rows]
    ram = [row.ram_bytes for row in verdict.rows]
    assert all(size <= ram[0] for size in ram), "a baseline may not have more bytes"
    assert any("does not beat 'random pages'" in remark for remark in verdict.remarks), verdict.remarks


def test_what_the_full_cache_cannot_do_is_not_counted(bundle: Bundle) -> None:
    suite = Suite(lengths=(192,), depths=(), keys=(), pairs=(), others=True)
    verdict = verify(bundle("demo"), INT8, STANDARD, replace(TINY, suite=suite))
    unmeasurable = [score.name for score in verdict.reference_tasks if not score.measurable]
    assert "instruction at the start" in unmeasurable
    assert not [f for f in verdict.findings if f.what.startswith("instruction")]
    assert any("not measurable on this model" in remark for remark in verdict.remarks)


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Path:
    return bundle(make_outlier_checkpoint(tmp_path_factory.mktemp("outliers")))


def test_key_outliers_pass_with_scales_per_channel_and_fail_with_scales_per_token(outliers: Path) -> None:
    settings = replace(TINY, tokens=640, decode=160, greedy=0)
    per_channel = verify(outliers, INT8, STANDARD, settings)
    assert [str(finding) for finding in per_channel.findings if not finding.passed] == []
    per_token = verify(outliers, replace(INT8, kv=KVMode.FP16), STANDARD, settings, control=EmulatedCodec("token"))
    summary = per_token.rows[0].all
    assert summary is not None
    assert not all(finding.passed for finding in hold(STANDARD.exact, summary, ""))
    assert summary.mean_kld > 8 * mean_kld(per_channel)


def test_the_emulated_codec_costs_what_the_real_one_does(outliers: Path) -> None:
    settings = replace(TINY, greedy=0)
    real = verify(outliers, INT8, STANDARD, settings)
    emulated = verify(outliers, replace(INT8, kv=KVMode.FP16), STANDARD, settings, control=EmulatedCodec("channel"))
    assert mean_kld(emulated) == pytest.approx(mean_kld(real), rel=0.2)


def mean_kld(verdict: Verdict) -> float:
    summary = verdict.rows[0].all
    assert summary is not None
    return summary.mean_kld
