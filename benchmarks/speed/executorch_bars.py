"""The bars of the ExecuTorch engine: against peers, the memory's limit, and ExecuTorch's own way to run a decoder."""

from __future__ import annotations

from .contestants import EXECUTORCH_OWN, OURS_EXECUTORCH
from .results import Bar, Results

#: Seconds from the start of the process to the first token, weights packed before.
START_S = 0.5


def executorch_bars(results: Results) -> list[Bar]:
    """Return the bars of the split form with int4 weights and INT8 pages."""

    def ours(context: int, key: str) -> float | None:
        return results.get(OURS_EXECUTORCH, context, key)

    found = []
    for context, bar in ((512, 1.35), (2048, 1.6), (8192, 2.0)):
        theirs = results.best_peer(context, "decode_tok_s")
        found.append(Bar(f"ExecuTorch: decode tok/s, {context}", ours(context, "decode_tok_s"), *theirs, bar))
    for context in (512, 2048, 8192):
        limit = ours(context, "limit_tok_s")
        mine = ours(context, "decode_tok_s")
        found.append(Bar(f"ExecuTorch: decode tok/s, {context}", mine, limit, "the memory's limit", 0.7))
    for context, bar in ((512, 1.5), (2048, 1.3), (8192, 1.1)):
        theirs = results.best_peer(context, "prefill_tok_s", float_kv=True)
        found.append(Bar(f"ExecuTorch: prefill tok/s, {context}", ours(context, "prefill_tok_s"), *theirs, bar))
    for context in (512, 2048, 8192):
        theirs = results.best_peer(context, "peak_rss_mb", least=True)
        mine = ours(context, "peak_rss_mb")
        found.append(Bar(f"ExecuTorch: peak RSS MB, {context}", mine, *theirs, 0.75, at_most=True))
    for context in (512, 4096):
        for own in EXECUTORCH_OWN.values():
            for key, name in (("decode_tok_s", "decode tok/s"), ("prefill_tok_s", "prefill tok/s")):
                theirs = results.get(own, context, key)
                found.append(Bar(f"ExecuTorch: {name}, {context}", ours(context, key), theirs, own, 1.0))
            theirs, mine = (results.get(name, context, "peak_rss_mb") for name in (own, OURS_EXECUTORCH))
            found.append(Bar(f"ExecuTorch: peak RSS MB, {context}", mine, theirs, own, 1.0, at_most=True))
    start = ours(512, "start_s")
    found.append(
        Bar("ExecuTorch: start to first token, s", start, 1.0, "one second", START_S, at_most=True, direct=start)
    )
    return found
