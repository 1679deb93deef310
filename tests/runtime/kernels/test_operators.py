"""ExecuTorch programs on operators of our own: the same tokens on every instruction set, and a clear line otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekv.bundle import read_manifest
from edgekv.errors import EngineError, UsageError
from edgekv.export import export_model
from edgekv.runtime.generate import Generator, RunOptions

kernels = pytest.importorskip("edgekv.runtime._kernels", reason="the native extension is not built")
pytest.importorskip("executorch", reason="the extra `executorch` is not installed")
pytest.importorskip("torchao", reason="the extra `executorch` is not installed")

pytestmark = pytest.mark.slow  # a bundle for ExecuTorch takes a minute to make

PROMPT = np.random.default_rng(0).integers(0, 250, 12).tolist()
CODE = """from edgekv.runtime.generate import Generator, RunOptions
with Generator.open({0!r}, RunOptions(threads=2)) as generator:
    print(list(generator.tokens({1}, max_tokens=24)))
"""


@pytest.fixture(scope="module")
def program(checkpoint: Callable[[str], Path], bundle: Callable[..., Path]) -> Path:
    """The bundle that test_engines.py takes through this engine in every run."""
    return bundle(checkpoint("qwen3-qk-norm"), engine="executorch", weights="int4", operators="edgekv")


def run(folder: Path, **environment: str) -> str:
    command = [sys.executable, "-c", CODE.format(str(folder), PROMPT)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **environment}
    ).stdout.strip()


def test_the_manifest_says_it_and_the_engine_says_what_computes(program: Path) -> None:
    assert read_manifest(program).operators == "edgekv"
    with Generator.open(program, RunOptions(threads=2)) as generator:
        assert "operators by edgekv" in generator.engine


def test_every_instruction_set_gives_the_same_tokens(program: Path) -> None:
    expected = run(program)
    assert expected.count(",") == 23
    for isa in kernels.available_isas():
        assert run(program, EDGEKV_ISA=isa) == expected, isa


def test_a_gated_gelu_gives_the_same_tokens_on_every_instruction_set(
    checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    folder = bundle(checkpoint("gemma3"), engine="executorch", weights="int4", operators="edgekv")
    expected = run(folder)
    assert expected.count(",") == 23
    for isa in kernels.available_isas():
        assert run(folder, EDGEKV_ISA=isa) == expected, isa


def test_a_long_prompt_in_chunks_and_at_once_ends_in_nearly_the_same_logits(program: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, 250, 150).tolist()
    logits = []
    for chunk in (16, 150):
        with Generator.open(program, RunOptions(threads=2, prefill_chunk=chunk)) as generator:
            logits.append(generator.score(tokens))
    # Few rows are 8-bit numbers, many rows 16-bit ones.
    assert np.sqrt(np.mean((logits[0] - logits[1]) ** 2)) < 0.05 * logits[0].std()


def test_without_the_native_kernels_it_is_one_line(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "edgekv.runtime._kernels", None)
    with pytest.raises(EngineError, match="needs the native kernels"):
        Generator.open(program, RunOptions(threads=2))


@pytest.mark.parametrize(
    ("engine", "weights", "line"),
    [("onnx", "int4", "is for --engine executorch"), ("executorch", "fp32", "--form split with --weights int4")],
)
def test_what_has_no_such_operators_is_refused(engine: str, weights: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=line):
        export_model("demo", tmp_path / "b", engine=engine, weights=weights, operators="edgekv")
    assert not (tmp_path / "b").exists()
