"""Predicted against real on this machine: `edgekv plan` with a calibrated profile, against runs of the same bundle.

Usage: python -m benchmarks.predictions.real BUNDLE PROFILE [--contexts 512 2048 8192] [--threads N]

PROFILE is what `edgekv profiles calibrate --bundle BUNDLE --out PROFILE.toml` wrote. Each context is run with all keys and
values in RAM, and within 25 % of the fp16 cache, so that pages stream from flash. Prints time to first token and time per token,
and how far off. A token's time is the median of sixteen, the fastest of three groups with a pause between: others who use the
same drive make it slower and never faster, and calibration takes the faster of two times likewise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from benchmarks.speed.timing import prompt
from edgekv.device_profiles import load
from edgekv.plan import Plan, Workload, make_plan, read_model
from edgekv.runtime.generate import Generator
from edgekv.runtime.options import RunOptions
from edgekv.runtime.pages.budget import resolve_budget
from edgekv.runtime.system.process import cache_home, default_threads
from edgekv.tiers import KVMode

GROUPS, GROUP, PAUSE_S, WARM_UP = 3, 16, 2.0, 64
STEPS = GROUPS * GROUP
BARS = {"decode": 0.15, "ttft": 0.25}


def measure(bundle: Path, context: int, budget: str | None, threads: int, folder: Path) -> tuple[float, float]:
    """Return the seconds to the first token of a prompt of ``context`` tokens, and the seconds per token after it."""
    options = RunOptions(kv_budget=budget, context=context + STEPS, threads=threads, offload=folder)
    tokens = prompt(context)
    with Generator.open(bundle, options) as generator:
        generator.prefill(tokens[1 : 1 + WARM_UP], max_tokens=1)
        start = time.perf_counter()
        generator.prefill(tokens, max_tokens=STEPS)
        first = time.perf_counter() - start
        groups = []
        for group in range(GROUPS):
            times = []
            for token in tokens[group * GROUP :][:GROUP]:
                start = time.perf_counter()
                generator.step([token])
                times.append(time.perf_counter() - start)
            groups.append(statistics.median(times))
            time.sleep(PAUSE_S)
    return first, min(groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("profile")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--dir", type=Path, default=cache_home() / "offload", help="folder for pages that do not fit")
    given = parser.parse_args()
    worst = {"decode": 0.0, "ttft": 0.0}
    print("| tokens | keys and values | TTFT predicted | real | off | per token predicted | real | off |")
    print("|---|---|---|---|---|---|---|---|")
    for context in given.contexts:
        for where, budget in (("in RAM", None), ("25 %, rest on flash", "25%")):
            plan = planned(given.bundle, given.profile, context, budget)
            first, step = measure(given.bundle, context, budget, given.threads, given.dir)
            off = {"ttft": plan.ttft_s / first - 1, "decode": step * plan.decode_tokens_per_s - 1}
            worst = {key: max(worst[key], abs(off[key])) for key in worst}
            ms = 1e3 / plan.decode_tokens_per_s
            print(
                f"| {context} | {where} | {plan.ttft_s:.2f} s | {first:.2f} s | {off['ttft']:+.0%}"
                f" | {ms:.1f} ms | {step * 1e3:.1f} ms | {off['decode']:+.0%} |",
                flush=True,
            )
    print(json.dumps({"worst": worst, "bars": BARS, "met": all(worst[key] <= BARS[key] for key in BARS)}))


def planned(bundle: Path, profile: str, context: int, budget: str | None) -> Plan:
    """Return the plan of the run that :func:`measure` makes."""
    model = read_model(bundle)
    limit = resolve_budget(budget, model.pages, context + STEPS)
    assert limit is None or isinstance(limit, int)
    workload = Workload(context=context + STEPS, prompt=context, kv_budget=limit, kv=KVMode.AUTO)
    return make_plan(model, load(profile), workload)


if __name__ == "__main__":
    main()
