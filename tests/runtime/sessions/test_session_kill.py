"""kill -9 at random moments of a run: the next one goes on from the last commit, to the tokens of a run that never stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def kill(bundle: Path, folder: Path, kills: int, seed: int) -> dict[str, int]:
    result = subprocess.run(
        [sys.executable, "-m", "tests.runtime.sessions.victim", str(bundle), str(folder), str(kills), str(seed)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    done: dict[str, int] = json.loads(result.stdout)
    return done


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_goes_on_from_its_last_commit(bundle: Callable[..., Path], tmp_path: Path) -> None:
    done = kill(bundle("demo"), tmp_path, 10, seed=1)
    assert done["kills"] >= 10
    assert done["completed"] >= 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_hundred_kills_lose_nothing_that_was_committed(bundle: Callable[..., Path], tmp_path: Path) -> None:
    done = kill(bundle("demo"), tmp_path, 200, seed=2)
    assert done["kills"] >= 200
    assert done["resumed_tokens"] > 0
