"""The bars of the benchmark: what each compares, what it must reach, and what a run reached."""

from __future__ import annotations

from .contestants import OURS, OURS_FP16
from .executorch_bars import executorch_bars
from .results import Bar, Results


def bars(results: Results) -> list[Bar]:
    """Return every bar with what the run reached."""
    found = []
    for measure, against, bench, key, bar in (
        ("decode attention, INT8, 8192", "ONNX Runtime GQA INT8", "attention_decode", "over_ort_int8", 1 / 3),
        ("decode attention, INT8, 8192", "reading those bytes", "attention_decode", "over_read", 1.5),
        ("prefill attention, 256 at 8192", "ONNX Runtime GQA fp32", "attention_prefill", "over_ort_fp32", 1.0),
    ):
        found.append(Bar(measure, None, None, against, bar, at_most=True, direct=results.kernel(bench, key)))
    for context, bar in ((512, 1.0), (2048, 1.2), (8192, 1.6)):
        ours = results.get(OURS, context, "decode_tok_s")
        found.append(Bar(f"decode tok/s, {context}", ours, *results.best_peer(context, "decode_tok_s"), bar))
    for context in (2048, 8192):
        ours = results.get(OURS, context, "prefill_tok_s")
        theirs = results.best_peer(context, "prefill_tok_s", float_kv=True)
        found.append(Bar(f"prefill tok/s, {context}", ours, *theirs, 0.95))
    ours, fp16 = results.get(OURS, 2048, "prefill_tok_s"), results.get(OURS_FP16, 2048, "prefill_tok_s")
    found.append(Bar("prefill tok/s, 2048, INT8 pages", ours, fp16, OURS_FP16, 0.97))
    for context in (2048, 8192):
        ours = results.get(OURS, context, "peak_rss_mb")
        theirs = results.best_peer(context, "peak_rss_mb", least=True)
        found.append(Bar(f"peak RSS MB, {context}", ours, *theirs, 0.85, at_most=True))
    found += executorch_bars(results)
    for context in (512, 2048):
        rest, total = results.get(OURS, context, "rest_ms"), results.get(OURS, context, "profiled_ms")
        found.append(Bar(f"page manager and Python, ms, {context}", rest, total, "the whole token", 0.08, at_most=True))
    return found
