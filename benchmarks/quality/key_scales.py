"""Why keys have one scale per channel: per-token key scales, emulated on the same graph, lose models with key outliers.

    python -m benchmarks.quality.key_scales [--tokens N] [--json]

Two models: the bundled one, and a random Qwen2-style one with a key channel per head whose bias is 30 times as large. Three
codecs: INT8 as edgekv does it (real pages and kernels), the same emulated, and the emulation with one key scale per token.
Prints a table in Markdown; the limits are those of the gate `standard`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from edgekv.export import export_model
from edgekv.runtime.generate import RunOptions
from edgekv.tiers import KVMode
from edgekv.verify.gate import load_gate
from edgekv.verify.judge import Settings, verify
from edgekv.verify.other_codecs import EmulatedCodec
from edgekv.verify.tasks import Suite
from edgekv.verify.verdict import hold
from tests.checkpoints import make_outlier_checkpoint

CODECS: dict[str, tuple[KVMode, EmulatedCodec | None]] = {
    "INT8 pages": (KVMode.INT8, None),
    "emulated, key scale per channel": (KVMode.FP16, EmulatedCodec("channel")),
    "emulated, key scale per token": (KVMode.FP16, EmulatedCodec("token")),
}


def measure(folder: Path, tokens: int) -> list[dict[str, Any]]:
    """Hold the distributions of every codec against the full fp16 cache and the standard gate."""
    limits = load_gate("standard").exact
    settings = Settings(tokens=tokens, decode=tokens // 4, greedy=1, suite=Suite.none(), baselines=False)
    rows = []
    for name, (kv, codec) in CODECS.items():
        row = verify(folder, RunOptions(kv=kv), load_gate("standard"), settings, control=codec).rows[0]
        assert row.all is not None
        assert row.decode is not None
        findings = hold(limits, row.all, "whole text") + hold(limits, row.decode, "token by token")
        rows.append(
            {
                "codec": name,
                "perplexity_change": row.all.perplexity_change,
                "mean_kld": row.all.mean_kld,
                "p99_kld": row.all.p99_kld,
                "max_kld": row.all.max_kld,
                "top1": row.all.top1,
                "failed": [str(finding) for finding in findings if not finding.passed],
            }
        )
    return rows


def compare(tokens: int) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of both models."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        checkpoint = Path(scratch) / "qwen2"
        checkpoint.mkdir()
        sources = {"bundled model": "demo", "key outliers x30": make_outlier_checkpoint(checkpoint)}
        results = {}
        for name, source in sources.items():
            bundle = Path(scratch) / f"{name}.edgekv"
            export_model(source, bundle, weights="fp32", page_size=32 if source == "demo" else 16)
            results[name] = measure(bundle, tokens)
        return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=960, help="of the text that is read")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    results = compare(arguments.tokens)
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    print("| model | codec | perplexity | mean KLD | 99 % | largest | top-1 | standard |")
    print("|---|---|---|---|---|---|---|---|")
    for model, rows in results.items():
        for row in rows:
            failed = row["failed"]
            outcome = f"fails: {failed[0].split(', the gate')[0]}" if failed else "passes"
            print(
                f"| {model} | {row['codec']} | {row['perplexity_change']:+.3%} | {row['mean_kld']:.1e} | {row['p99_kld']:.1e}"
                f" | {row['max_kld']:.1e} | {row['top1']:.2%} | {outcome} |"
            )


if __name__ == "__main__":
    main()
