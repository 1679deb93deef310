"""ExecuTorch runs the same decoder: the same tokens as ONNX Runtime, without torch, and a clear line when it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekv.bundle import read_manifest
from edgekv.runtime.generate import Generator, RunOptions, cache_home
from edgekv.tiers import KVMode
from tests.cases import seldom
from tests.conftest import VARIANTS

pytest.importorskip("executorch", reason="the extra `executorch` is not installed")

pytestmark = pytest.mark.slow  # its bundles take a minute to make

Bundle = Callable[..., Path]
#: The start of a script for a process of its own.
OPEN = """from edgekv.runtime.generate import Generator
with Generator.open({0!r}) as generator:
"""


def prompt(count: int, vocab: int = 256, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, vocab, count).tolist()
    return tokens


def generate(folder: Path, tokens: list[int], count: int, **options: object) -> list[int]:
    with Generator.open(folder, RunOptions(threads=2, **options)) as generator:  # type: ignore[arg-type]
        return list(generator.tokens(tokens, max_tokens=count))


def test_greedy_tokens_equal_those_of_onnx_at_any_budget(bundle: Bundle) -> None:
    onnx, executorch = bundle("demo"), bundle("demo", engine="executorch")
    tokens = prompt(700, 1000)
    expected = generate(onnx, tokens, 48)
    assert generate(executorch, tokens, 48) == expected
    assert generate(executorch, tokens, 48, prefill_chunk=50) == expected
    compressed = generate(onnx, tokens, 48, kv=KVMode.INT8)
    assert generate(executorch, tokens, 48, kv=KVMode.INT8) == compressed
    assert generate(executorch, tokens, 48, kv_budget="25%") == compressed


def test_logits_of_every_row_equal_those_of_onnx(bundle: Bundle) -> None:
    tokens, rows = prompt(150, 1000), []
    for engine in ("onnx", "executorch"):
        with Generator.open(bundle("demo", engine=engine), RunOptions(threads=2, kv=KVMode.FP16)) as generator:
            rows.append(generator.score(tokens))
    np.testing.assert_allclose(rows[0], rows[1], atol=2e-4)


@pytest.mark.parametrize("variant", seldom(VARIANTS, but=("qwen2-bias",), mark=pytest.mark.exhaustive))
def test_every_kind_of_decoder_gives_the_tokens_of_onnx(
    variant: str, checkpoint: Callable[[str], Path], bundle: Bundle
) -> None:
    source, tokens = checkpoint(variant), prompt(460)  # enough that a quarter of their cache holds a staging ring
    onnx, executorch = (bundle(source, engine=engine) for engine in ("onnx", "executorch"))
    for options in ({}, {"kv_budget": "25%", "kv": KVMode.INT8}):
        expected = generate(onnx, tokens, 40, **{**options, "kv_budget": None})
        assert generate(executorch, tokens, 40, **options) == expected


def test_the_inline_form_gives_the_same_tokens(bundle: Bundle) -> None:
    split, inline = bundle("demo", engine="executorch"), bundle("demo", "inline", engine="executorch")
    for count, options in ((700, {}), (1, {}), (700, {"kv": KVMode.INT8}), (4500, {"kv": KVMode.INT8})):
        tokens = prompt(count, 1000)
        assert generate(inline, tokens, 24, **options) == generate(split, tokens, 24, **options)


def test_the_command_runs_without_torch(bundle: Bundle) -> None:
    code = (
        "import sys; from edgekv.cli.main import app\n"
        f"sys.argv = ['edgekv', 'run', {str(bundle('demo', engine='executorch'))!r}, '-p', 'It was', '-n', '4', '--json']\n"
        "try: app()\nexcept SystemExit as end: assert not end.code, end\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'executorch', 'onnxruntime')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    answer, modules = result.stdout.splitlines()
    assert json.loads(answer)["engine"].startswith("executorch ")
    assert modules == "[]"


def test_a_second_start_maps_the_packed_weights_and_a_changed_file_is_made_again(bundle: Bundle) -> None:
    from edgekv.runtime.engines.executorch.build import version
    from edgekv.runtime.engines.executorch.packed import PackedCache

    folder = bundle("demo", engine="executorch")
    expected = generate(folder, prompt(20), 8)
    run = [
        sys.executable,
        "-c",
        f"{OPEN.format(str(folder))}    print(list(generator.tokens({prompt(20)}, max_tokens=8)))",
    ]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == str(expected)
    packed = PackedCache(cache_home(), read_manifest(folder), version())
    assert packed.path.stat().st_size > 1_000_000
    data = bytearray(packed.path.read_bytes())
    data[4096:8192] = b"\xff" * 4096
    packed.path.write_bytes(data)
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == str(expected)


def test_without_a_compiler_the_python_bindings_run_it_and_say_so(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    folder = bundle("demo", engine="executorch")
    expected = generate(folder, prompt(30), 6)
    code = (
        "from edgekv.runtime.engines.executorch import build\n"
        "build._compiler = lambda: None\n"
        f"{OPEN.format(str(folder))}    print(generator.engine); print(list(generator.tokens({prompt(30)}, max_tokens=6)))"
    )
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    engine, tokens = result.stdout.splitlines()[-2:]
    assert "through torch, slower (the ExecuTorch engine is compiled on first use and no C++ compiler" in engine
    assert tokens == str(expected)


def test_generators_that_are_open_at_once_may_ask_for_different_threads(bundle: Bundle) -> None:
    """ExecuTorch has one pool of threads for a process, and what is open holds it."""
    folder, tokens = bundle("demo", engine="executorch"), prompt(100, 1000)
    code = (
        "from edgekv.runtime.generate import Generator, RunOptions\n"
        f"first = Generator.open({str(folder)!r}, RunOptions(threads=1))\n"
        f"said = list(first.tokens({tokens}, max_tokens=8))\n"
        f"second = Generator.open({str(folder)!r}, RunOptions(threads=2))\n"
        f"assert list(second.tokens({tokens}, max_tokens=8)) == said\n"
        f"first.prefill({tokens[::-1]}, max_tokens=8)\n"
        f"assert list(first.tokens({tokens}, max_tokens=8)) == said\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.returncode}: {result.stderr}"
