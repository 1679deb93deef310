"""Kills runs of a session with SIGKILL, again and again; run by test_session_kill.py as a process of its own.

    python -m tests.runtime.sessions.victim BUNDLE FOLDER KILLS SEED

Everything is imported once; each run is a forked child, so that a kill costs a fraction of a second. Prints one JSON line.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import edgekv.runtime.engines.onnx  # noqa: F401  (before the first fork)
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.sessions.folder import is_session
from edgekv.runtime.sessions.tools import contents, verify
from edgekv.tiers import KVMode

PROMPT_TOKENS = 120
TOTAL_TOKENS = 700


def options(path: Path | None, rng: random.Random, budget: str | None) -> RunOptions:
    session = SessionOptions(path, checkpoint_tokens=rng.choice([1, 3, 8, 33])) if path else None
    return RunOptions(
        threads=1, kv=KVMode.INT8, context=TOTAL_TOKENS, kv_budget=budget, session=session, prefill_chunk=64
    )


def run(bundle: Path, path: Path, prompt: list[int], options: RunOptions, shared: mmap.mmap) -> None:
    with Generator.open(bundle, options) as generator:
        generator.manifest.model.__dict__["eos_token_ids"] = ()
        assert generator.session is not None
        so_far = generator.session.tokens
        start = so_far if len(so_far) >= len(prompt) else prompt
        if len(start) == TOTAL_TOKENS:
            return  # the last run was killed on its way out
        for _ in generator.tokens(start, max_tokens=TOTAL_TOKENS - len(start)):
            # What a checkpoint has promised, as the process knew it at the moment of the kill.
            shared[:8] = struct.pack("<Q", len(generator.session.tokens))


def in_child(work: object, *arguments: object) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)  # type: ignore[operator]
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return child


def main(bundle: Path, folder: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    prompt = [rng.randrange(2, 1000) for _ in range(PROMPT_TOKENS)]
    whole = folder / "whole.json"

    def reference() -> None:
        with Generator.open(bundle, options(None, rng, None)) as generator:
            generator.manifest.model.__dict__["eos_token_ids"] = ()
            answer = list(generator.tokens(prompt, max_tokens=TOTAL_TOKENS - PROMPT_TOKENS))
            whole.write_text(json.dumps(prompt + answer))

    assert os.waitpid(in_child(reference), 0)[1] == 0
    expected = json.loads(whole.read_text())
    shared = mmap.mmap(-1, 8)
    done = {"kills": 0, "completed": 0, "resumed_tokens": 0}
    path = folder / "chat.kv"
    longest = 0.5
    while done["kills"] < kills or not done["completed"]:
        shared[:8] = bytes(8)
        started = time.monotonic()
        budget = rng.choice([None, None, "40%"])
        child = in_child(run, bundle, path, prompt, options(path, rng, budget), shared)
        if done["kills"] < kills:
            time.sleep(rng.uniform(0.0, longest))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), f"the run failed with status {status}"
        done["kills"] += status == signal.SIGKILL
        promised = struct.unpack("<Q", shared[:8])[0]
        if is_session(path) and any(path.glob("pages-*")):
            tokens = contents(path)["tokens"]
            assert tokens == expected[: len(tokens)], "the session holds something else than the uninterrupted run"
            assert len(tokens) >= promised, f"{promised} tokens were committed, {len(tokens)} are there"
            problems, usable = verify(path)
            assert not problems, problems
            assert usable == len(tokens)
            done["resumed_tokens"] += len(tokens)
        else:
            assert not promised
        if status == 0:
            assert contents(path)["tokens"] == expected
            done["completed"] += 1
            longest = max(0.1, time.monotonic() - started)
            shutil.rmtree(path)
    print(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
