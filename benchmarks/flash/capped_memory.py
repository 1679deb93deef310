"""A long session inside a memory limit that the operating system enforces, with a KV budget and without.

    python -m benchmarks.flash.capped_memory BUNDLE [--context 16384] [--kv-budget 64MiB] [--limit 384MiB]

Runs the same prompt twice in a process of its own under a control group: with the budget, keeping a session, which must complete
and resume; and without, which the system must kill. Prints a JSON line for each; exits with 1 unless it went so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.speed import timing
from edgekv.jail import run_limited
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.sizes import parse_bytes
from edgekv.tiers import KVMode, PressureMode

GENERATE = 16


def child(options: argparse.Namespace) -> None:
    """Run the prompt, in the limited process."""
    settings = RunOptions(
        kv=KVMode.INT8,
        kv_budget=options.kv_budget or None,
        context=options.context,
        offload=options.folder / "offload",
        session=SessionOptions(options.folder / "long.kv") if options.kv_budget else None,
        pressure=PressureMode.IGNORE,
        prefixes=False,
        own_process=True,
    )
    tokens = timing.prompt(options.context - GENERATE)
    started = time.perf_counter()
    with Generator.open(options.bundle, settings) as generator:
        count = len(list(generator.tokens(tokens, max_tokens=GENERATE)))
        reused = generator.stats.reused_tokens
    line = {"generated": count, "reused_tokens": reused, "seconds": round(time.perf_counter() - started, 1)}
    print(json.dumps({**line, "peak_rss_mb": timing.memory_mb("VmHWM"), "anonymous_mb": timing.memory_mb("RssAnon")}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--context", type=int, default=16_384)
    parser.add_argument("--kv-budget", default="64MiB")
    parser.add_argument("--limit", default="384MiB")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        child(options)
        return 0
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for name, budget in (("budget", options.kv_budget), ("budget, resumed", options.kv_budget), ("no budget", "")):
            command = [sys.executable, __file__, str(options.bundle), "--folder", folder]
            command += ["--context", str(options.context), "--kv-budget", budget]
            sentence = run_limited(command, parse_bytes(options.limit))
            print(json.dumps({"run": name, "outcome": str(sentence)}), flush=True)
            outcomes.append((sentence.returncode == 0, sentence.killed))
    return 0 if outcomes[0][0] and outcomes[1][0] and outcomes[2][1] else 1


if __name__ == "__main__":
    raise SystemExit(main())
