"""What products lose in int4, and what a budget of bits does with it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from edgekv.errors import UsageError
from edgekv.export import export_model
from edgekv.export.checkpoint import Checkpoint, open_checkpoint
from edgekv.export.compensate import nearest
from edgekv.export.decoder import parameter_sources
from edgekv.export.mixed import mixed_kinds
from edgekv.export.rounding import Calibration, sequences
from edgekv.export.sensitivity import int4_costs
from edgekv.export.walk import Walk
from tests.checkpoints import TEXT, make_checkpoint

CALIBRATION = Calibration(TEXT * 40, "")


@torch.no_grad()
def logits(checkpoint: Checkpoint, rounded: tuple[str, ...]) -> torch.Tensor:
    """Return the distributions of two sequences, logarithms, with some matrices each at the nearest codes."""
    walk = Walk(checkpoint, sequences(checkpoint, CALIBRATION, 2))
    for index in range(checkpoint.config.model.n_layers + 1):
        segment = walk.load()
        for name, parameter in segment.named_parameters():
            if set(parameter_sources(checkpoint, index, name)) & set(rounded):
                parameter.copy_(nearest(parameter).values(parameter.shape[1]))
        if index < checkpoint.config.model.n_layers:
            walk.advance(segment)
    return torch.log_softmax(torch.cat([segment(*stream.rows(slice(None))) for stream in walk.streams]).double(), -1)


@pytest.mark.parametrize("family", ["mistral", "cohere2"])
def test_a_cost_is_about_the_divergence_that_rounding_the_product_causes(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, family, num_hidden_layers=3))
    costs = int4_costs(checkpoint, CALIBRATION)
    assert sorted(name for names in costs for name in names) == sorted(
        {checkpoint.head, *(name for name in checkpoint.location if name.endswith("_proj.weight"))}
    )
    whole = logits(checkpoint, ())
    for names, cost in costs.items():
        seen = float((whole.exp() * (whole - logits(checkpoint, names))).sum(-1).mean())
        assert 0.4 * seen < cost < 2.5 * seen, (names, seen, cost)


def test_mixed_weights_are_int8_where_int4_would_cost_most_for_its_size(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "c", num_hidden_layers=3)
    out = tmp_path / "b"
    manifest = export_model(source, out, weights="mixed:6", calibration=write(tmp_path / "text"))
    assert (manifest.engine, manifest.weights) == ("onnx", "int4")
    kinds = manifest.matrices_by_kind()
    assert set(kinds) == {"int4", "int8"}
    bits = 8 * sum(facts["bytes"] for facts in kinds.values()) / sum(facts["weights"] for facts in kinds.values())
    assert 5.7 < bits <= 6

    checkpoint = open_checkpoint(source)
    costs = int4_costs(checkpoint, CALIBRATION)
    chosen = mixed_kinds(checkpoint, 6, CALIBRATION)

    def cost_for_size(names: tuple[str, ...]) -> float:
        return costs[names] / sum(math.prod(checkpoint.location[name].shape) for name in names)

    most, least = max(costs, key=cost_for_size), min(costs, key=cost_for_size)
    assert {chosen.of(name) for name in most} == {"int8"}
    assert {chosen.of(name) for name in least} == {"int4"}


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ("mixed:5", {}, r"less than int4 has with its scales: at least mixed:5\.13"),
        (
            "mixed:six",
            {},
            r"weights must be one of int4, .*, stored, or mixed:N with N bits a weight such as mixed:6, not 'mixed:six'",
        ),
        ("mixed:12", {}, "must be one of int4"),
        ("mixed", {}, "must be one of int4"),
        ("mixed:6", {"calibration": "none"}, "measures on a calibration text; leave --calibration none out"),
        ("mixed:6", {"engine": "executorch"}, "is for --engine onnx"),
        ("mixed:6", {"operators": "xnnpack"}, "is for --engine onnx"),
    ],
)
def test_mixed_weights_that_cannot_be_had_are_refused_in_one_line(
    tmp_path: Path, weights: str, changes: dict[str, str], message: str
) -> None:
    source = make_checkpoint(tmp_path / "c", num_hidden_layers=1)
    with pytest.raises(UsageError, match=message):
        export_model(source, tmp_path / "b", weights=weights, **{"calibration": write(tmp_path / "text"), **changes})  # type: ignore[arg-type]


def write(path: Path) -> Path:
    path.write_text(CALIBRATION.text)
    return path
