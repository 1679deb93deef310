"""One decoder, however it is exported: each (engine, form, weights, operators, architecture) against transformers.

With fp32 weights the greedy tokens are the same. Quantised weights are held to their own eager reference: transformers
on the very weights that the bundle stores, in float32. What is left is the INT8 rounding of activations.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from edgekv.contract import ENGINES, FORMS, WEIGHTS
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.tiers import KVMode
from tests.checkpoints import load_reference
from tests.conftest import MODEL_TYPES, OWN_OPERATORS, VARIANTS

Bundle = Callable[..., Path]
#: Root mean square of the logit error over that of the logits; stated in docs/executorch.md.
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-3, "int8": 0.03, "int4": 0.03}
#: The architecture that is taken through more weights and forms than the others.
ALWAYS = "qwen3-qk-norm"

#: The programs of ExecuTorch's delegate that CI exports, a minute or two each: every kind, but not every pair. Rotation and
#: windows are outside the programs of the split form; the inline form of the bundled model is exported for other tests.
OFTEN = {
    ("split", "fp32", "qwen2-bias"),
    ("split", "int8", ALWAYS),
    ("split", "int4", ALWAYS),
}


def cases() -> Iterator[Any]:
    for architecture, engine, form, weights in itertools.product([*VARIANTS, *MODEL_TYPES], ENGINES, FORMS, WEIGHTS):
        if engine == "executorch" and weights == "fp16":
            continue  # refused at export: XNNPACK would compute in float32
        if (engine, form) == ("executorch", "inline") and weights != "fp32" and architecture != ALWAYS:
            continue  # a minute each; the split form takes the same weights through every architecture
        if engine == "onnx":
            # Float32 of the others is test_generate.py's, and their int8 and fp16 differ from those of one in shapes alone.
            rare = architecture != ALWAYS and (form, weights) != ("split", "int4")
            often = architecture == ALWAYS and (weights == "fp32" or (form, weights) == ("split", "int4"))
            marks = [] if often else [pytest.mark.exhaustive if rare else pytest.mark.slow]
            yield pytest.param(engine, form, weights, None, architecture, marks=marks)
            continue
        missing = [name for name in ("executorch", "torchao") if importlib.util.find_spec(name) is None]
        needs = pytest.mark.skipif(bool(missing), reason="the extra `executorch` is not installed")
        seldom = pytest.mark.slow if (form, weights, architecture) in OFTEN else pytest.mark.exhaustive
        yield pytest.param(engine, form, weights, None, architecture, marks=[needs, seldom])
        if (form, weights) == ("split", "int4"):
            seldom = pytest.mark.slow if architecture in (ALWAYS, *OWN_OPERATORS) else seldom
            yield pytest.param(engine, form, weights, "edgekv", architecture, marks=[needs, seldom])


def prompt(count: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(0).integers(0, 250, count).tolist()
    return tokens


def as_stored(matrix: torch.Tensor, engine: str, weights: str, *, table: bool, symmetric: bool) -> torch.Tensor:
    """Return a matrix as a bundle holds it, dequantised.

    Args:
        table: an embedding that is not the head too: its rows are looked up, so they are INT8 where products are int4.
    """
    from edgekv.export.onnx.matmul_nbits import BITS, quantise

    if weights in ("fp32", "fp16"):
        return matrix.to(torch.float16 if weights == "fp16" else torch.float32).float()
    if engine == "executorch" and not table:
        from edgekv.export.executorch import weights as executorch_weights

        return executorch_weights.quantise(matrix, weights).dequantise()
    bits = 8 if table else BITS[weights]
    stored = quantise(matrix.numpy(), bits, symmetric=symmetric)
    codes, zeros = stored.codes.astype(np.float32), np.full((), 2 ** (bits - 1), np.float32)
    if bits == 4:
        codes = np.stack([stored.codes & 15, stored.codes >> 4], -1).reshape(*stored.codes.shape[:2], -1)
    if stored.zeros is not None:
        each = stored.zeros if bits == 8 else np.stack([stored.zeros & 15, stored.zeros >> 4], -1)
        zeros = each.reshape(matrix.shape[0], -1, 1)[:, : codes.shape[1]].astype(np.float32)
    return torch.from_numpy(((codes - zeros) * stored.scales[:, :, None]).reshape(matrix.shape[0], -1))


def eager_reference(source: Path, engine: str, form: str, weights: str) -> PreTrainedModel:
    """Return transformers' model of a checkpoint, with the weights that a bundle of it stores."""
    model = load_reference(source)
    tied = bool(model.config.tie_word_embeddings)
    apart = not tied or (engine, form) == ("executorch", "inline") or (engine, weights) == ("onnx", "int4")
    with torch.no_grad():
        if tied and apart:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                embedding = "embed_tokens" in name
                whole = embedding and engine == "executorch" and form == "inline" and weights in ("int4", "int8")
                if whole:  # a scale per row, in the graph
                    from edgekv.export.executorch import weights as executorch_weights

                    parameter.copy_(executorch_weights.quantise(parameter, "int8").dequantise())
                    continue
                symmetric = weights == "int8" or embedding
                parameter.copy_(as_stored(parameter, engine, weights, table=embedding and apart, symmetric=symmetric))
    return model


@pytest.mark.parametrize(("engine", "form", "weights", "operators", "architecture"), list(cases()))
def test_every_way_through_the_decoder_computes_what_transformers_does(
    engine: str,
    form: str,
    weights: str,
    operators: str | None,
    architecture: str,
    checkpoint: Callable[[str], Path],
    bundle: Bundle,
) -> None:
    source, given = checkpoint(architecture), prompt(40)
    model = eager_reference(source, engine, form, weights)
    inputs = torch.tensor([given])
    with torch.no_grad():
        expected = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=24, do_sample=False, eos_token_id=None
        )[0]
        reference = model(expected[None]).logits[0].numpy()
    folder = bundle(source, form, weights, engine=engine, operators=operators)
    options = RunOptions(threads=2, kv=KVMode.FP16)
    if weights == "fp32":
        with Generator.open(folder, options) as run:
            assert list(run.tokens(given, max_tokens=24)) == expected[40:].tolist()
    with Generator.open(folder, options) as run:  # one of its own: score() adds to what a generator holds
        rows = run.score(expected.tolist())
    error = np.sqrt(np.square(rows - reference).mean() / np.square(reference).mean())
    assert error <= TOLERANCE[weights], error
