"""Many clients of a real server for minutes: every answer is that of a run of its own, no request is lost, memory stays as it is.

python -m tests.soak.serving BUNDLE [--minutes 5] [--vanish] [--kill] [--seed N]

``--vanish``: clients go away in the middle at random. ``--kill``: in the middle of it the server is killed (SIGKILL) and started
again; what was under way then is asked again.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from openai import APIConnectionError, APIStatusError, OpenAI

from edgekv.runtime.generate import Generator
from edgekv.runtime.options import RunOptions
from edgekv.tiers import KVMode

CLIENTS, PROMPTS, ANSWER = 16, 60, 24
#: What memory may grow by after the first fifth of the time: pages that the allocator keeps, counters.
ALLOWED_GROWTH = 32 << 20


@dataclass
class Outcome:
    """What came of a soak. ``faults``: wrong answers and errors that no client should see."""

    answers: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)

    @property
    def growth(self) -> int:
        """Bytes by which the server grew, from the first fifth of the time to its end."""
        early = self.rss[: max(1, len(self.rss) // 5)]
        return max(self.rss[-max(1, len(self.rss) // 5) :]) - max(early) if self.rss else 0


def prompts(seed: int) -> list[str]:
    """Return prompts of all lengths, many of which begin alike."""
    choose = random.Random(seed)
    story = "It was a dark night and the king said to his men that they must go to the sea before the sun came up again"
    words = story.split(" ")
    heads = [" ".join(choose.choices(words, k=count)) for count in (40, 200, 450)]
    return [
        f"{choose.choice(heads)} {' '.join(choose.choices(words, k=choose.randrange(1, 60)))}" for _ in range(PROMPTS)
    ]


def expected(bundle: Path, texts: list[str]) -> dict[str, str]:
    """Return what a run of its own gives for each prompt, greedily."""
    answers = {}
    for text in texts:
        with Generator.open(bundle, RunOptions(kv=KVMode.INT8, prefixes=False)) as generator:
            answers[text] = "".join(generator.stream(text, max_tokens=ANSWER))
    return answers


class Server:
    """A real server, its folder, and how much memory it takes."""

    def __init__(self, bundle: Path, folder: Path, budget: str) -> None:
        self._words = [
            sys.executable, "-m", "edgekv", "serve", str(bundle), "--port", "0", "--json", "--quiet", "--parallel", "4",
            "--queue", "64", "--kv-budget", budget, "--context", "1024", "--cache-dir", str(folder), "--cache-limit", "24MiB",
            "--exact", "--model-name", "soak",
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._words, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url: str = json.loads(self.process.stdout.readline())["url"]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def rss_bytes(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def soak(bundle: Path, minutes: float, *, vanish: bool, kill: bool, seed: int = 0, budget: str = "3MiB") -> Outcome:
    """Let clients ask for so long, and return what came of it."""
    outcome, texts = Outcome(), prompts(seed)
    answers = expected(bundle, texts)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(bundle, Path(folder) / "cache", budget)
        until, away = time.monotonic() + 60 * minutes, threading.Event()

        def client(number: int) -> None:
            choose = random.Random(seed * 1000 + number)
            while time.monotonic() < until:
                text = choose.choice(texts)
                leaves = vanish and choose.random() < 0.3
                try:
                    asked = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
                    parts = []
                    with asked.completions.create(
                        model="soak", prompt=text, max_tokens=ANSWER, temperature=0, stream=True
                    ) as stream:
                        for part in stream:
                            parts.append(part.choices[0].text if part.choices else "")
                            if leaves and choose.random() < 0.2:
                                break
                        else:
                            leaves = False
                    said = "".join(parts)
                    if leaves:
                        outcome.answers["left"] += 1
                        right = answers[text].startswith(said)
                    else:
                        outcome.answers["whole"] += 1
                        right = said == answers[text]
                    if not right and not away.is_set():
                        outcome.faults.append(f"{text[-40:]!r}: {said!r} instead of {answers[text]!r}")
                except (APIConnectionError, APIStatusError, OSError) as error:
                    if isinstance(error, APIStatusError) and error.status_code == 429:
                        outcome.answers["busy"] += 1
                        time.sleep(0.2)
                    elif away.is_set():
                        outcome.answers["lost in the kill"] += 1
                        time.sleep(0.5)
                    else:
                        outcome.faults.append(f"{text[-40:]!r}: {type(error).__name__}: {error}")
                except Exception as error:
                    if not away.is_set():
                        outcome.faults.append(f"{text[-40:]!r}: {type(error).__name__}: {error}")

        threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        middle = time.monotonic() + 30 * minutes
        while time.monotonic() < until:
            time.sleep(0.25)
            if kill and time.monotonic() > middle:
                kill = False
                away.set()
                server.kill()
                server.start()
                time.sleep(2.0)
                outcome.rss.clear()
                away.clear()
            outcome.rss.append(server.rss_bytes())
        for thread in threads:
            thread.join()
        server.process.send_signal(signal.SIGINT)
        if server.process.wait(60) != 130:
            outcome.faults.append(f"the server ended with {server.process.returncode}")
    if outcome.growth > ALLOWED_GROWTH:
        outcome.faults.append(f"memory grew by {outcome.growth} bytes")
    return outcome


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("--minutes", type=float, default=5)
    arguments.add_argument("--vanish", action="store_true")
    arguments.add_argument("--kill", action="store_true")
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    outcome = soak(given.bundle, given.minutes, vanish=given.vanish, kill=given.kill, seed=given.seed)
    print(json.dumps({**outcome.answers, "growth_bytes": outcome.growth, "rss_bytes": max(outcome.rss, default=0)}))
    for fault in outcome.faults:
        print(fault)
    sys.exit(1 if outcome.faults else 0)


if __name__ == "__main__":
    main()
