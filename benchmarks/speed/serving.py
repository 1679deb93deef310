"""What a service saves and shares: turns that come back from flash, sequences that decode together, a short request in between.

python -m benchmarks.speed.serving BUNDLE [--tokens 4096]

Prints a JSON line for each figure, then the bars; exit code 1 when one is missed. Ratios are of medians of one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgekv.runtime.generate import RunOptions, default_threads
from edgekv.runtime.serving.request import Event, Failed, Finished, Piece, Reading, Request
from edgekv.runtime.serving.service import Service, ServiceOptions
from edgekv.tiers import Together

#: Tokens of a turn: what a person types, and what the model answers.
ASKED, ANSWERED = 30, 20


class Timed:
    """A request, and when what came of it."""

    def __init__(self, service: Service, tokens: Sequence[int], count: int) -> None:
        self.tokens: list[int] = []
        self.at: list[float] = []
        self.steps: list[float] = []
        self.end: Event | None = None
        self._over = threading.Event()
        never = dict.fromkeys(service.manifest.model.eos_token_ids, -1000.0)
        self._began = time.perf_counter()
        service.submit(Request(tuple(tokens), max_tokens=count, logit_bias=never), self._told)

    def _told(self, event: Event) -> None:
        now = time.perf_counter() - self._began
        if isinstance(event, Reading):
            self.steps.append(now)
        if isinstance(event, Piece):
            self.tokens += [fact.token for fact in event.tokens]
            self.at.append(now)
        if isinstance(event, Finished | Failed):
            self.end = event
            self._over.set()

    def wait(self) -> Timed:
        """Return it when it is over."""
        self._over.wait()
        if isinstance(self.end, Failed):
            raise self.end.error
        return self


def serve(bundle: Path, **options: object) -> Service:
    run = RunOptions(context=6144, threads=default_threads(), own_process=True)
    return Service(bundle, ServiceOptions(run, **options))  # type: ignore[arg-type]


def random_tokens(count: int, seed: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(5, 1000, count).tolist()
    return found


def conversations(bundle: Path, n_tokens: int, rounds: int) -> dict[str, float]:
    """Let two conversations alternate on one sequence: each turn must come back from flash."""
    with tempfile.TemporaryDirectory() as folder:
        cold, turns, restarted = [], [], []
        service = serve(bundle, parallel=1, cache_dir=Path(folder))
        said = []
        for seed in range(2):
            prompt = random_tokens(n_tokens, seed)
            first = Timed(service, prompt, ANSWERED).wait()
            cold.append(first.at[0])
            said.append(prompt + first.tokens)
        for at in range(rounds):
            for which in range(2):
                prompt = said[which] + random_tokens(ASKED, 10 + at)
                turn = Timed(service, prompt, ANSWERED).wait()
                turns.append(turn.at[0])
                said[which] = prompt + turn.tokens
        service.close()
        service = serve(bundle, parallel=1, cache_dir=Path(folder))
        for which in range(2):
            turn = Timed(service, said[which] + random_tokens(ASKED, 99), ANSWERED).wait()
            restarted.append(turn.at[0])
        service.close()
    whole = statistics.median(cold)
    return {
        "first_token_computed_s": whole,
        "first_token_of_a_turn_s": statistics.median(turns),
        "first_token_after_a_restart_s": statistics.median(restarted),
        "turn_ratio": statistics.median(turns) / whole,
        "restart_ratio": statistics.median(restarted) / whole,
    }


def together(bundle: Path, count: int, rounds: int) -> dict[str, float]:
    """Decode one sequence, and several at once, at 512 tokens."""
    service = serve(bundle, parallel=count, together=Together.ALWAYS)

    def rate(n: int, seed: int) -> float:
        asked = [Timed(service, random_tokens(512, seed * 10 + at), 64) for at in range(n)]
        base = [one._began for one in asked]
        times = [[when + began for when in one.wait().at] for one, began in zip(asked, base, strict=True)]
        start, stop = max(row[0] for row in times), min(row[-1] for row in times)
        return sum(1 for row in times for when in row if start < when <= stop) / (stop - start)

    rate(count, 0)
    pairs = [(rate(1, seed), rate(count, seed)) for seed in range(1, rounds + 1)]
    service.close()
    one, many = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"one_tokens_per_s": one, "together_tokens_per_s": many, "together_ratio": many / one}


def beside(bundle: Path, n_tokens: int, rounds: int) -> dict[str, float]:
    """Ask something short while a long prompt is read; in units of a step of that prompt."""
    service = serve(bundle, parallel=2)
    waits, steps = [], []
    for seed in range(rounds):
        long = Timed(service, random_tokens(n_tokens, 50 + seed), 1)
        while not long.steps:
            time.sleep(0.001)
        short = Timed(service, random_tokens(20, 80 + seed), 4).wait()
        waits.append(short.at[0])
        long.wait()
        steps += [later - earlier for earlier, later in zip(long.steps, long.steps[1:], strict=False)]
    service.close()
    step = statistics.median(steps)
    return {"short_first_token_s": max(waits), "step_s": step, "short_in_steps": max(waits) / step}


BARS = {"turn_ratio": 1 / 20, "restart_ratio": 1 / 20, "together_ratio": 2.2, "short_in_steps": 3.0}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("--tokens", type=int, default=4096)
    arguments.add_argument("--rounds", type=int, default=5)
    given = arguments.parse_args()
    figures: dict[str, float] = {}
    measures: list[Callable[[], dict[str, float]]] = [
        lambda: conversations(given.bundle, given.tokens, given.rounds),
        lambda: together(given.bundle, 4, given.rounds),
        lambda: beside(given.bundle, given.tokens, given.rounds),
    ]
    for measure in measures:
        for name, value in measure().items():
            print(json.dumps({"figure": name, "value": round(value, 5)}), flush=True)
            figures[name] = value
    missed = 0
    for name, bar in BARS.items():
        met = figures[name] >= bar if name == "together_ratio" else figures[name] <= bar
        missed += not met
        print(f"{name}: {figures[name]:.3f}, bar {bar:.3f}: {'met' if met else 'MISSED'}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
