"""The inline form against its bars: memory, speed beside the split form, bytes that its nodes write.

    python -m benchmarks.speed.inline [--rounds 5]        (make bench-inline)

Exports the bundled model in both forms (fp32) and prints one JSON line per measurement, then a table of the bars; exits with 1
when one is missed. Speed is measured in one process, the two forms in turn, medians; memory is the peak of `edgekv run`, a
process for each length. Two threads, INT8 pages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekv.bundle import read_manifest
from edgekv.export import export_model
from edgekv.ort import onnxruntime as ort
from edgekv.runtime.decoder.inline import InlineForward
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.text import Text
from edgekv.tiers import KVMode

from .results import Bar

THREADS = 2
LENGTHS = (300, 2000, 6000, 8000)
DECODE_AT = (2000, 6000)
PREFILL_AT = 6000
BYTES_AT = 2063
#: The first token of a run is left out of its median, and so many are measured.
STEPS = 40
#: Nodes whose outputs are their inputs, or, of an If, what nodes of its branch wrote.
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "If")
MIB = 1024 * 1024
OVERHEAD_MIB = 160


def main() -> int:
    """Measure, print, and say by the exit code whether every bar was met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch:
        folders = {form: Path(scratch) / form for form in ("split", "inline")}
        for form, folder in folders.items():
            export_model("demo", folder, form=form, engine="onnx", weights="fp32")
        bars = [*memory(folders["inline"], Path(scratch)), *speed(folders, rounds), bytes_written(folders["inline"])]
    width = max(len(f"{bar.measure} against {bar.against}") for bar in bars)
    for bar in bars:
        sign, mark = ("<=" if bar.at_most else ">="), ("met" if bar.met else "MISSED")
        print(f"{f'{bar.measure} against {bar.against}':{width}}  {bar.ratio or 0:8.2f}  {sign} {bar.bar:g}  {mark}")
    return 0 if all(bar.met for bar in bars) else 1


def memory(folder: Path, scratch: Path) -> list[Bar]:
    """Measure the peak of `edgekv run` at each length."""
    manifest = read_manifest(folder)
    spec = manifest.model.pages(manifest.page_size)
    weights = manifest.files["weights.bin"]["bytes"]
    text = Text.open(folder, manifest)
    tokens = text.encode(" ".join(["It was a dark night and he went home."] * 2000))
    bars = []
    for length in LENGTHS:
        prompt = scratch / "prompt.txt"
        prompt.write_text(text.decode(tokens[: length - 40]), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "edgekv",
            "run",
            str(folder),
            "--raw",
            "--prompt-file",
            str(prompt),
            "--kv",
            "int8",
        ]
        command += ["--max-tokens", "32", "--threads", str(THREADS), "--json"]
        stats = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        held = -(-length // spec.page_size) * spec.n_layers * spec.warm_bytes
        allowed = weights + 2 * held + OVERHEAD_MIB * MIB
        peak = stats["peak_rss_bytes"]
        say(
            measure="memory",
            tokens=length,
            prompt=stats["prefill_tokens"],
            peak_mib=peak / MIB,
            allowed_mib=allowed / MIB,
        )
        bars.append(
            Bar(
                f"peak memory at {length}",
                peak,
                allowed,
                f"weights + 2 x cache + {OVERHEAD_MIB} MiB",
                1.0,
                at_most=True,
            )
        )
    return bars


def speed(folders: Mapping[str, Path], rounds: int) -> list[Bar]:
    """Measure both forms in turn."""
    bars = []
    options = RunOptions(threads=THREADS, kv=KVMode.INT8, prefixes=False, context=8192)
    generators = {form: Generator.open(folder, options) for form, folder in folders.items()}
    vocabulary = next(iter(generators.values())).manifest.model.vocab_size
    for length in sorted({*DECODE_AT, PREFILL_AT}):
        prefill: dict[str, list[float]] = {form: [] for form in folders}
        decode: dict[str, list[float]] = {form: [] for form in folders}
        for seed in range(rounds):
            tokens = np.random.default_rng(seed).integers(2, vocabulary, length).tolist()
            for form, generator in generators.items():
                started = time.perf_counter()
                generator.prefill(tokens, max_tokens=STEPS + 1)
                prefill[form].append(time.perf_counter() - started)
                decode[form].append(statistics.median(timed_steps(generator)))
        ms = {form: 1000 * statistics.median(times) for form, times in decode.items()}
        rate = {form: length / statistics.median(times) for form, times in prefill.items()}
        say(measure="speed", tokens=length, decode_ms=ms, prefill_tokens_per_s=rate)
        if length in DECODE_AT:
            bars.append(Bar(f"decode at {length}", ms["inline"], ms["split"], "split, ms", 3.0, at_most=True))
        if length == PREFILL_AT:
            bars.append(Bar(f"prefill of {length}", rate["inline"], rate["split"], "split, tokens/s", 0.5))
    for generator in generators.values():
        generator.close()
    return bars


def timed_steps(generator: Generator) -> list[float]:
    """Return seconds per token."""
    generator.step([5])
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        generator.step([5])
        seconds.append(time.perf_counter() - started)
    return seconds


class Recorder:
    """An engine that remembers what it was given last."""

    max_tokens = None

    def __init__(self, engine: Any) -> None:
        self.engine, self.description = engine, engine.description
        self.feeds: dict[str, Any] = {}

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run a step."""
        self.feeds = dict(feeds)
        results: dict[str, Any] = self.engine.run(feeds)
        return results


def bytes_written(folder: Path) -> Bar:
    """Count what the nodes of one decode step write, by ONNX Runtime's own profile."""
    options = RunOptions(threads=THREADS, kv=KVMode.INT8, prefixes=False, context=8192)
    with Generator.open(folder, options) as generator:
        generator.prefill([5] * BYTES_AT, max_tokens=2)
        assert generator.prepared is not None
        forward = generator.prepared.forward
        assert isinstance(forward, InlineForward)
        recorder = Recorder(forward.engine)
        forward.engine = recorder
        generator.step([5])
        feeds = {name: np.array(value) for name, value in recorder.feeds.items()}
        cache = sum(page.nbytes for name, page in feeds.items() if name.startswith(("key_", "value_")))
    with tempfile.TemporaryDirectory() as scratch:
        session_options = ort.SessionOptions()
        session_options.enable_profiling, session_options.profile_file_prefix = True, str(Path(scratch) / "profile")
        session = ort.InferenceSession(folder / "model.onnx", session_options, providers=["CPUExecutionProvider"])
        session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    by_type: dict[str, int] = {}
    for event in events:
        facts = event.get("args", {})
        if event.get("cat") == "Node" and "output_size" in facts and facts["op_name"] not in VIEWS:
            by_type[facts["op_name"]] = by_type.get(facts["op_name"], 0) + int(facts["output_size"])
    written = sum(by_type.values())
    largest = dict(sorted(by_type.items(), key=lambda item: -item[1])[:8])
    say(measure="bytes", tokens=BYTES_AT, written=written, cache=cache, largest=largest)
    return Bar(f"bytes written by nodes at {BYTES_AT}", written, cache, "the INT8 cache", 4.0, at_most=True)


def say(**facts: object) -> None:
    """Print one line."""
    print(json.dumps(facts, default=float), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
