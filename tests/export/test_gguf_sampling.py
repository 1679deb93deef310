"""Sampling in a GGUF file: read as generation_config.json is, and what is not done is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from typer.testing import CliRunner

from edgekv.bundle import SamplingSpec
from edgekv.cli.main import app
from edgekv.errors import CheckpointError
from edgekv.export.gguf.file import GgufFile
from edgekv.export.gguf.sampling import not_applied, read_gguf_sampling
from tests.checkpoints import make_checkpoint

from .gguf_files import convert

HALF = float(np.float32(0.6))


def asking(**keys: Any) -> GgufFile:
    return GgufFile(Path("m.gguf"), {f"general.sampling.{name}": value for name, value in keys.items()}, {})


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"temp": HALF, "top_k": 20, "top_p": 0.95}, SamplingSpec(0.6, 20, 0.95)),
        ({"temp": HALF}, SamplingSpec(0.6, 50, 1.0)),
        ({"top_k": -1}, SamplingSpec(1.0, 0, 1.0)),
        ({"temp": 0.0, "top_k": 20}, None),
        ({"penalty_repeat": 1.5}, SamplingSpec(repetition_penalty=1.5)),
        ({"penalty_repeat": 1.5, "penalty_last_n": 0}, None),
        ({"min_p": 0.1}, None),
    ],
)
def test_keys_mean_what_they_mean_in_a_generation_config(keys: dict[str, Any], expected: SamplingSpec | None) -> None:
    assert read_gguf_sampling(asking(**keys)) == expected


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"temp": HALF, "min_p": 0.0, "mirostat": 0, "mirostat_tau": 5.0, "xtc_threshold": 0.1}, ()),
        ({"temp": HALF, "min_p": 0.1, "mirostat": 2, "mirostat_tau": 5.0}, ("min_p", "mirostat", "mirostat_tau")),
        ({"temp": HALF, "sequence": "kpt"}, ("sequence",)),
        ({"min_p": 0.1, "mirostat": 2}, ()),
        ({"penalty_repeat": 1.5, "penalty_last_n": 64}, ("penalty_last_n",)),
        ({"penalty_repeat": 1.5, "penalty_last_n": -1}, ()),
        ({"penalty_last_n": 64}, ()),
    ],
)
def test_what_would_change_an_answer_and_is_not_done_is_told(keys: dict[str, Any], told: tuple[str, ...]) -> None:
    assert tuple(not_applied(asking(**keys))) == tuple(f"general.sampling.{name}" for name in told)


@pytest.mark.parametrize(
    ("name", "value"), [("temp", -1.0), ("temp", "hot"), ("top_p", 1.5), ("top_k", 2.5), ("penalty_repeat", 0.0)]
)
def test_a_senseless_setting_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"m.gguf: general.sampling.{name} is .*; it must be"):
        read_gguf_sampling(asking(**{"temp": 0.5, name: value}))


def test_the_command_takes_them_over_and_says_what_it_does_not_do(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", num_hidden_layers=1)
    keys = {
        "general.sampling.temp": np.float32(0.6),
        "general.sampling.top_k": 20,
        "general.sampling.min_p": np.float32(0.1),
    }
    path = convert(folder, tmp_path / "m.gguf", "llama", GGMLQuantizationType.Q8_0, {}, **keys)
    done = CliRunner().invoke(app, ["export", str(path), "--out", str(tmp_path / "b")])
    assert done.exit_code == 0, done.output
    assert "m.gguf asks for general.sampling.min_p=0.1, which edgekv does not do" in " ".join(done.output.split())
    sampling = json.loads((tmp_path / "b" / "manifest.json").read_text())["sampling"]
    assert sampling == {"temperature": 0.6, "top_k": 20, "top_p": 1.0, "repetition_penalty": 1.0}
