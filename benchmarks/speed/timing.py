"""What every measurement shares: the prompt, the clock, the process's memory, and how busy others kept the machine.

Needs NumPy only, because it is imported by each contestant's own environment.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

#: Tokens that are generated; the median counts.
GENERATE = 32
#: Slots beyond prompt and generated tokens that every contestant's cache gets.
SPARE = 16
WARM_UP = 16


def arguments(description: str | None) -> argparse.Namespace:
    """Parse what ``bench.py`` passes to each measurement."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="folder or file of the model")
    parser.add_argument("--name", required=True)
    parser.add_argument("--kv", required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def prompt(n_tokens: int, vocabulary: int = 32_000) -> list[int]:
    """Return the same random tokens for every contestant."""
    tokens: list[int] = np.random.RandomState(7).randint(2, vocabulary, n_tokens).tolist()
    return tokens


def memory_mb(key: str) -> float:
    """Return a memory figure of this process in MB (2**20): VmHWM, RssAnon, RssFile."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return round(int(line.split()[1]) / 1024, 1)
    return 0.0


def process_age_s() -> float:
    """Return the seconds since this process was started, the interpreter's own start included (needs /proc)."""
    started = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


class Meter:
    """Cores that other processes used while we measured (needs /proc)."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        fields = [int(value) for value in Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:9]]
        user, nice, system, _, _, irq, soft_irq, steal = fields
        busy = (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")
        own = resource.getrusage(resource.RUSAGE_SELF)
        return time.perf_counter(), busy, own.ru_utime + own.ru_stime

    def other_cpu(self) -> float:
        """Return the cores that others kept busy since the start."""
        seconds, busy, own = (now - then for now, then in zip(self._read(), self._start, strict=True))
        return round(max(0.0, busy - own) / seconds, 2)


def wait_for_quiet(cores: float, seconds: float) -> None:
    """Wait until others use at most this many cores, but no longer than ``seconds``. The caller must be idle."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        meter = Meter()
        time.sleep(1.0)
        if meter.other_cpu() <= cores:
            return


class Timing:
    """Times prefill and decoding of one contestant, and prints the line."""

    def __init__(self, options: argparse.Namespace, peer: str, load_s: float) -> None:
        self._options, self._peer, self._load_s = options, peer, load_s

    def measure(self, prefill: Callable[[list[int]], Any], step: Callable[[], Any]) -> dict[str, Any]:
        """Run it.

        Args:
            prefill: fills the cache and returns when the first token is known.
            step: generates one more token.
        """
        context = self._options.context
        tokens = prompt(context)
        meter = Meter()
        started = time.perf_counter()
        prefill(tokens)
        first = time.perf_counter() - started
        times = []
        for _ in range(GENERATE):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
        return {
            "name": self._options.name,
            "peer": self._peer,
            "kv": self._options.kv,
            "context": context,
            "threads": self._options.threads,
            "prefill_tok_s": round(len(tokens) / first, 1),
            "first_token_s": round(first, 3),
            "decode_tok_s": round(1 / statistics.median(times), 2),
            "decode_best_tok_s": round(1 / min(times), 2),
            "peak_rss_mb": memory_mb("VmHWM"),
            "anonymous_mb": memory_mb("RssAnon"),
            "mapped_mb": memory_mb("RssFile"),
            "load_s": round(self._load_s, 2),
            "other_cpu": meter.other_cpu(),
        }


def emit(line: dict[str, Any]) -> None:
    """Print one JSON line and leave at once: some peers' destructors are slow."""
    print(json.dumps(line), flush=True)
    os._exit(0)
