"""A program that knows edgekv from its documents alone runs a bundle with the bits of `edgekv run`, in both directions."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inline_driver
import numpy as np
import pytest
from inline_driver import Driver
from session_files import Session, read_session, write_session
from tokenizers import Tokenizer

from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from tests.cases import seldom
from tests.checkpoints import make_checkpoint
from tests.sessions import session_options


def same(one: Session, other: Session) -> None:
    """Check that two sessions hold the same bits."""
    for name in ("key", "tokens", "n_kv", "steps", "pruned"):
        assert getattr(one, name) == getattr(other, name), name
    packed = [[[page.pack() for page in layers] for layers in session.pages] for session in (one, other)]
    assert packed[0] == packed[1]
    for mine, theirs in ((one.open_keys, other.open_keys), (one.open_values, other.open_values)):
        assert (mine is None) == (theirs is None)
        assert mine is None or theirs is None or np.array_equal(mine, theirs)


def test_it_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(inline_driver.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules - {"__future__", "collections.abc"} == {
        "itertools", "json", "numpy", "onnxruntime", "pathlib", "session_files", "typing",
    }  # fmt: skip


def compare(folder: Path, count: int, answer: int, session: Path) -> None:
    """Let both answer a prompt of ``count`` tokens; ``session``: where edgekv keeps its own."""
    prompt = np.random.default_rng(0).integers(0, 250, count).tolist()
    options = RunOptions(threads=2, session=SessionOptions(session), prefixes=False)
    with Generator.open(folder, options) as generator:
        tokens = list(generator.tokens(prompt, max_tokens=answer))
    driver = Driver(folder, options=session_options())
    assert driver.generate(driver.read(prompt), answer) == tokens
    same(driver.save(), read_session(session))


@pytest.mark.parametrize("variant", seldom(["qwen3-qk-norm", "mistral-window"], but=["mistral-window"]))
@pytest.mark.parametrize("count", [300, 48])
def test_tokens_pages_and_sessions_have_the_bits_of_edgekv(
    variant: str, count: int, checkpoint: Callable[[str], Path], bundle: Callable[..., Path], tmp_path: Path
) -> None:
    compare(bundle(checkpoint(variant), "inline"), count, 21, tmp_path / "theirs.kv")


@pytest.mark.slow
def test_a_step_of_many_tokens_and_heads_is_one_call(bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = bundle(make_checkpoint(tmp_path / "many heads", "qwen3", std=0.04, num_attention_heads=48), "inline")
    compare(folder, 300, 5, tmp_path / "theirs.kv")


@pytest.mark.parametrize("pruned", seldom([range(16, 32), range(20, 50), range(48, 55)], but=[range(20, 50)]))
def test_pruned_tokens_are_seen_by_nobody_and_count_for_scales(
    pruned: range, checkpoint: Callable[[str], Path], bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = bundle(checkpoint("qwen3-qk-norm"), "inline")
    prompt = np.random.default_rng(0).integers(0, 250, 55).tolist()
    options = RunOptions(threads=2, session=SessionOptions(tmp_path / "theirs.kv"), prefixes=False)
    with Generator.open(folder, options) as generator:
        generator.prefill(prompt, max_tokens=40)
        assert generator.cache is not None
        generator.cache.prune(np.array(pruned))
        generator.save(whole=True)
    driver = Driver(folder, read_session(tmp_path / "theirs.kv"), session_options())
    with Generator.open(folder, options) as generator:
        answer = list(generator.tokens([*prompt, 7], max_tokens=21))
        assert generator.stats.reused_tokens == 55
    assert driver.generate(driver.read([7]), 21) == answer
    same(driver.save(), read_session(tmp_path / "theirs.kv"))


@pytest.mark.slow
def test_each_continues_the_sequence_of_the_other(bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder, theirs, mine = bundle("demo", "inline"), tmp_path / "theirs.kv", tmp_path / "mine.kv"
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    prompt = "An operating system runs programs that are larger than its memory"

    def run(session: Path, *arguments: str) -> str:
        command = [
            sys.executable,
            "-m",
            "edgekv",
            "run",
            str(folder),
            "--session",
            str(session),
            "-q",
            "--threads",
            "2",
        ]
        return subprocess.run([*command, *arguments], check=True, capture_output=True, text=True).stdout

    run(theirs, "-p", prompt, "-n", "24")
    shutil.copytree(theirs, tmp_path / "copy.kv")
    tokenizer = Tokenizer.from_file(str(folder / manifest["tokenizer"]))
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    driver = Driver(folder, options=session_options())
    driver.generate(driver.read([*manifest["prompt_begin"], *ids, *manifest["prompt_end"]]), 24)
    write_session(mine, driver.save())
    same(read_session(mine), read_session(theirs))

    expected = run(theirs, "--continue", "-n", "20")
    assert len(expected) > 20
    assert run(mine, "--continue", "-n", "20") == expected
    going_on = Driver(folder, read_session(tmp_path / "copy.kv"), session_options())
    going_on.generate(going_on.read([]), 20)
    same(going_on.save(), read_session(theirs))
