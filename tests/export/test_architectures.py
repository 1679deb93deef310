"""The decoder of every model type, as exporters trace it, gives the logits and greedy tokens of transformers.

What engines make of the same modules is tested in ``test_parity.py`` and ``tests/test_engines.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekv.export.checkpoint import open_checkpoint
from tests.checkpoints import load_reference
from tests.conftest import MODEL_TYPES
from tests.export.driver import EagerDriver

TOLERANCE = 1e-3
PROMPT: list[int] = np.random.default_rng(0).integers(0, 250, 40).tolist()


@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_a_prompt_in_chunks_and_greedy_tokens_give_the_logits_of_transformers(
    variant: str, checkpoint: Callable[[str], Path]
) -> None:
    source = checkpoint(variant)
    driver, tokens = EagerDriver(source), list(PROMPT)
    rows = [driver.step(PROMPT[:25]), driver.step(PROMPT[25:])]
    for _ in range(8):
        tokens.append(int(rows[-1][-1].argmax()))
        rows.append(driver.step(tokens[-1:]))
    with torch.no_grad():
        expected = load_reference(source)(torch.tensor([tokens])).logits[0].numpy()
    assert expected[39:-1].argmax(axis=1).tolist() == tokens[40:]
    assert len(set(tokens[40:])) > 1, "so small a model says one token again and again"
    assert np.abs(np.concatenate(rows) - expected).max() <= TOLERANCE


def test_a_model_whose_queries_grow_with_their_positions_is_for_texts_in_which_they_do_not(
    checkpoint: Callable[[str], Path],
) -> None:
    assert open_checkpoint(checkpoint("ministral3")).config.model.max_context == 256
