"""edgekv against its peers, end to end, and its attention kernels against ONNX Runtime's: `make bench`.

Every measurement is a process of its own and prints one JSON line; the contestants take turns, so that the machine's
moods meet all of them. Then a table of every figure, and one of every bar with its ratio. Exits with 1 when a bar is
missed or could not be measured. Peers live in the folder that EDGEKV_PEERS or --peers names
(benchmarks/peers/setup.sh makes it); those that are not there are reported as missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from edgekv import NO_TELEMETRY  # set for this process and for every contestant that it starts

from .contestants import BUNDLES, CHECKPOINT, CONFIGURATIONS, CONTEXTS, ROOT, Configuration
from .engines import engine_row, record
from .plot import plot
from .results import QUIET, Line, Results
from .tables import bar_table, figure_table
from .timing import wait_for_quiet

assert NO_TELEMETRY.items() <= os.environ.items()


def say(text: str) -> None:
    """Report progress."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def prepare(peers: Path) -> None:
    """Make checkpoint and bundle where they are missing, or older than the exporter."""
    if not (peers / CHECKPOINT / "model.safetensors").exists():
        say("making the checkpoint")
        command = [sys.executable, str(ROOT / "benchmarks" / "peers" / "make_checkpoint.py"), str(peers / CHECKPOINT)]
        subprocess.run(command, check=True)
    newest = max(path.stat().st_mtime for path in (ROOT / "export").rglob("*.py"))
    for bundle, export in BUNDLES.items():
        manifest = peers / bundle / "manifest.json"
        if manifest.exists() and manifest.stat().st_mtime >= newest:
            continue
        if "executorch" in export and find_spec("torchao") is None:
            say('executorch is not installed (pip install "edgekv[executorch]")')
            continue
        say(f"exporting {bundle}")
        command = [sys.executable, "-m", "edgekv", "export", str(peers / CHECKPOINT), "--weights", "int4"]
        command += [*export, "--out", str(peers / bundle), "--force"]
        subprocess.run(command, check=True, cwd=ROOT)


def schedule(options: argparse.Namespace) -> Iterator[tuple[Configuration, int]]:
    """Yield what to run, the contestants in turn."""
    present = []
    for configuration in CONFIGURATIONS:
        missing = configuration.missing(options.peers)
        if missing:
            say(f"{configuration.name} is missing: {missing} (benchmarks/peers/setup.sh)")
        elif not options.only or any(name in configuration.name for name in options.only):
            present.append(configuration)
    for context in options.contexts:
        for index in range(options.rounds):
            for configuration in present:
                if index < configuration.rounds.get(context, 0):
                    yield configuration, context


def run(command: list[str]) -> list[Line]:
    """Run a measurement and return its lines; none if it failed, with the reason on stderr."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        say(f"failed: {' '.join(command)}\n{done.stderr[-2000:]}")
    return lines


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a results.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measure(options: argparse.Namespace) -> Iterator[Line]:
    """Yield the lines of the whole run."""
    if options.kernels != "none":
        wait_for_quiet(QUIET, options.wait)
        yield from run([sys.executable, "-m", "benchmarks.kernels.attention", "--threads", str(options.threads)])
    for configuration, context in schedule(options) if options.kernels != "only" else ():
        command = configuration.command(options.peers, context, threads=options.threads, own_python=sys.executable)
        wait_for_quiet(QUIET, options.wait)
        lines = run(command)
        if lines and lines[0]["other_cpu"] > QUIET:
            say(f"others used {lines[0]['other_cpu']} cores, again: {configuration.name}, {context}")
            wait_for_quiet(QUIET, options.wait)
            lines += run(command)
        yield from lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=os.environ.get("EDGEKV_PEERS", ROOT / "bench-output" / "peers"))
    parser.add_argument("--out", type=Path, default=ROOT / "bench-output", help="folder for results.jsonl and the plot")
    parser.add_argument("--rounds", type=int, default=3, help="at the most; slow contestants run less often")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, choices=CONTEXTS)
    parser.add_argument("--wait", type=float, default=30, help="seconds to wait for a quiet machine before each")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only contestants whose name contains one of these; no kernels"
    )
    parser.add_argument("--record", action="store_true", help="write this machine's row of export/engines.json")
    parser.add_argument("--append", action="store_true", help="add to results.jsonl, for rounds in several sittings")
    parser.add_argument("--kernels", choices=["first", "only", "none"], help="the attention kernels")
    parser.add_argument("--report", type=Path, help="measure nothing: the tables of an earlier results.jsonl")
    options = parser.parse_args()
    options.kernels = options.kernels or ("none" if options.only else "first")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.report:
        lines = read_lines(options.report)
    else:
        prepare(options.peers)
        path = options.out / "results.jsonl"
        lines = read_lines(path) if options.append and path.exists() else []
        with path.open("a" if options.append else "w", encoding="utf-8") as file:
            for line in measure(options):
                print(json.dumps(line), flush=True)
                file.write(json.dumps(line) + "\n")
                file.flush()
                lines.append(line)
    results = Results(lines)
    print(figure_table(results))
    table, missed = bar_table(results)
    print(table)
    row = engine_row(results)
    if row:
        print(f"\nthe row of this machine in export/engines.json: {json.dumps(asdict(row))}")
        if options.record:
            record(row)
    (options.out / "benchmarks.svg").write_text(plot(results), encoding="utf-8")
    say(f"plot: {options.out / 'benchmarks.svg'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
