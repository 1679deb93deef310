"""Leaves runs that stream from flash before they are over, in every way there is; run by test_left_early.py as its own process.

    python -m tests.runtime.leaver BUNDLE WAY TIMES

Under a sanitizer it shows that nothing is written to memory that went with the run.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from edgekv.runtime.generate import Generator, RunOptions
from edgekv.tiers import KVMode, PressureMode, Tier

PROMPT = [random.Random(0).randrange(2, 250) for _ in range(900)]


def begin(bundle: Path) -> tuple[Generator, Iterator[int]]:
    """Return a generator and the rest of its tokens, with reads in flight for the next one."""
    options = RunOptions(kv=KVMode.INT8, threads=2, kv_budget="1240KiB", pressure=PressureMode.IGNORE, prefixes=False)
    generator = Generator.open(bundle, options)
    tokens = generator.tokens(PROMPT, max_tokens=20)
    next(tokens)
    assert generator.cache is not None
    assert (generator.cache.table.tier == Tier.COLD).sum() > 200
    return generator, tokens


def drop(bundle: Path) -> None:
    """Forget both: the reader goes while its reads are in flight."""
    generator, tokens = begin(bundle)
    del generator, tokens


def iterator(bundle: Path) -> None:
    """Close the iterator and forget the generator."""
    generator, tokens = begin(bundle)
    next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    del generator


def circle(bundle: Path) -> None:
    """Leave both to the collector of cycles."""
    held: list[object] = list(begin(bundle))
    held.append(held)
    del held
    gc.collect()


def callback(bundle: Path) -> None:
    """Let a callback fail in the middle of the prompt."""

    def fail(done: int, total: int) -> None:
        if done > 300:
            raise LookupError("enough")

    options = RunOptions(kv=KVMode.INT8, threads=2, kv_budget="1240KiB", prefill_chunk=64, prefixes=False)
    generator = Generator.open(bundle, options)
    try:
        next(generator.tokens(PROMPT, max_tokens=20, progress=fail))
    except LookupError:
        return
    raise AssertionError("the callback failed")


WAYS: dict[str, Callable[[Path], None]] = {way.__name__: way for way in (drop, iterator, circle, callback)}


def main() -> None:
    bundle, name, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    counts = []
    for _ in range(times):
        WAYS[name](bundle)
        gc.collect()
        counts.append(len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0)
    print("ok" if counts[-1] == counts[0] else counts)


if __name__ == "__main__":
    main()
