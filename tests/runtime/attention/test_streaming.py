"""A cache that does not fit: every page comes back from flash for every token, and nothing changes but the memory it takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekv.jail import LimitedRun, run_limited
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.storage.record import neighbours
from edgekv.tiers import KVMode, PressureMode, Tier
from tests.checkpoints import make_checkpoint

Bundle = Callable[..., Path]
PROMPT: list[int] = np.random.default_rng(3).integers(2, 1000, 600).tolist()
COUNT = 256


def greedy(folder: Path, **changes: object) -> Iterator[np.ndarray]:
    """Yield the logits of each step."""
    options = RunOptions(kv=KVMode.INT8, threads=2, pressure=PressureMode.IGNORE, **changes)  # type: ignore[arg-type]
    with Generator.open(folder, options) as generator:
        logits = generator.prefill(PROMPT, max_tokens=COUNT)
        for _ in range(COUNT):
            yield logits
            logits = generator.step([int(logits.argmax())])
        if "kv_budget" in changes:
            assert generator.cache is not None
            assert generator.cache.manager.counters.pages_fetched > COUNT, "most steps read from flash"


@pytest.mark.parametrize(
    ("page_size", "budgets"), [pytest.param(16, ["15%", "40%"], marks=pytest.mark.slow), (32, ["20%", "45%"])]
)
def test_logits_are_those_of_a_run_with_every_page_in_ram_bit_for_bit(
    page_size: int, budgets: list[str], bundle: Bundle, tmp_path: Path
) -> None:
    folder = bundle("demo", page_size=page_size)
    expected = [logits.copy() for logits in greedy(folder)]
    for budget in budgets:
        for step, (ours, theirs) in enumerate(
            zip(greedy(folder, kv_budget=budget, offload=tmp_path / budget), expected, strict=True)
        ):
            np.testing.assert_array_equal(ours, theirs, err_msg=f"step {step}, budget {budget}")


def test_pages_of_a_layer_lie_side_by_side_on_flash(bundle: Bundle, tmp_path: Path) -> None:
    options = RunOptions(kv=KVMode.INT8, threads=2, kv_budget="20%", offload=tmp_path, pressure=PressureMode.IGNORE)
    with Generator.open(bundle("demo"), options) as generator:
        generator.prefill(PROMPT * 3, max_tokens=1)
        assert generator.cache is not None
        table = generator.cache.table
        runs = [
            stop - start
            for layer in range(table.tier.shape[0])
            for start, stop in neighbours(table.record[layer, table.tier[layer] == Tier.COLD].tolist())
        ]
    assert np.mean(runs) > 8, "a request for each page would leave the medium idle"


#: 8 layers, 16 KV heads of 64: 17 KiB of INT8 cache per token beside weights of a few MB.
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "max_position_embeddings": 16384,
}
CHILD = """
import sys
from pathlib import Path
from typing import Any
import numpy as np
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.tiers import KVMode, PressureMode

folder, budget, offload = sys.argv[1:]
options = RunOptions(
    kv=KVMode.INT8, threads=2, kv_budget=budget or None, offload=Path(offload), pressure=PressureMode.IGNORE, prefixes=False
)
tokens = np.random.default_rng(0).integers(2, 250, 12000).tolist()
with Generator.open(folder, options) as generator:
    print(len(list(generator.tokens(tokens, max_tokens=8))))
"""


def capped(folder: Path, budget: str, offload: Path) -> LimitedRun:
    limit_bytes = 240 * 1024 * 1024
    return run_limited([sys.executable, "-c", CHILD, str(folder), budget, str(offload)], limit_bytes)


@pytest.mark.slow
def test_a_process_that_the_system_caps_completes_with_a_budget_and_dies_without(
    bundle: Bundle, tmp_path: Path
) -> None:
    folder = bundle(make_checkpoint(tmp_path / "wide", **WIDE))
    sentence = capped(folder, "16MiB", tmp_path)
    if sentence.kind == "rlimit":
        pytest.skip("no control group may be made here, and an rlimit counts address space, not memory")
    assert sentence.returncode == 0, str(sentence)
    assert capped(folder, "", tmp_path).killed, "204 MB of pages do not fit beside the process"
