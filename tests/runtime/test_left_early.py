"""Runs that stream from flash and are left before they are over: an ordinary event, whichever way it happens."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cases import seldom
from tests.checkpoints import make_checkpoint
from tests.runtime.leaver import WAYS

#: Small, but for its cache: a step has many pieces to read ahead.
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 48,
}


@pytest.fixture(scope="module")
def streams(bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(make_checkpoint(tmp_path_factory.mktemp("wide") / "model", **SHAPE))


@pytest.mark.parametrize("way", seldom(WAYS, but=("drop", "callback")))
def test_a_run_that_is_left_early_harms_nothing_and_keeps_nothing_open(way: str, streams: Path) -> None:
    times = 100 if way == "drop" and "EDGEKV_SANITIZED" in os.environ else 5
    command = [sys.executable, "-m", "tests.runtime.leaver", str(streams), way, str(times)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (run.returncode, run.stdout, run.stderr) == (0, "ok\n", "")
