"""What cannot run on ExecuTorch is refused in one clear line that says what to do, through the command as people meet it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekv.bundle import read_manifest, write_manifest
from edgekv.contract import segment_spec
from edgekv.errors import EngineError
from edgekv.runtime.generate import Generator, RunOptions, cache_home
from tests.cases import seldom

pytest.importorskip("executorch", reason="the extra `executorch` is not installed")

pytestmark = pytest.mark.slow  # its bundles take a minute to make

Bundle = Callable[..., Path]


def run(folder: Path, *, first: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command on a bundle in a process of its own.

    Args:
        first: a statement before it.
    """
    arguments = ["edgekv", "run", str(folder), "-p", "It was", "-n", "4", "--quiet"]
    code = f"import sys; {first}\nfrom edgekv.cli.main import main\nsys.argv = {arguments!r}\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Assert that the command failed with one line on stderr that holds these words."""
    assert result.returncode != 0
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("edgekv: ")
    for word in words:
        assert word in lines[0], lines[0]


def changed(folder: Path, into: Path, change: Callable[[bytes], bytes]) -> Path:
    """Copy a bundle with its program changed and its manifest made to fit: the embedding is a file of its own."""
    shutil.copytree(folder, into)
    path = into / "model.pte"
    shutil.copy(path, into / "embedding.bin")
    path.write_bytes(change(path.read_bytes()))
    manifest = read_manifest(into)
    assert manifest.embedding is not None
    embedding = dataclasses.replace(manifest.embedding, file="embedding.bin")
    write_manifest(into, dataclasses.replace(manifest, embedding=embedding))
    return into


def installed_without(library: str, into: Path) -> Path:
    """Make a folder with an executorch package that lacks one of its libraries."""
    from edgekv.runtime.engines.executorch.build import package_folder

    package = into / "executorch"
    (package / "lib").mkdir(parents=True)
    for path in package_folder().iterdir():
        if path.name != "lib":
            (package / path.name).symlink_to(path)
    for path in (package_folder() / "lib").iterdir():
        if library not in path.name:
            (package / "lib" / path.name).symlink_to(path)
    return into


@pytest.mark.parametrize("keep", seldom([0, 3, 40, 5000, 1_000_000], but=[3, 1_000_000]))
def test_a_truncated_program(keep: int, bundle: Bundle, tmp_path: Path) -> None:
    folder = changed(bundle("demo", engine="executorch"), tmp_path / "b", lambda data: data[:keep])
    one_line(run(folder), "executorch", "cannot load", "model.pte", "export the bundle again")


def test_a_program_in_the_format_of_another_version(bundle: Bundle, tmp_path: Path) -> None:
    folder = changed(
        bundle("demo", engine="executorch"), tmp_path / "b", lambda data: data.replace(b"ET12", b"ET99", 1)
    )
    one_line(run(folder), "executorch 1.5.1 cannot load", "ET99", "export the bundle again")


def test_a_program_for_the_delegate_of_another_version(bundle: Bundle, tmp_path: Path) -> None:
    folder = changed(bundle("demo", engine="executorch"), tmp_path / "b", lambda data: data.replace(b"XN01", b"XN99"))
    one_line(run(folder), "executorch 1.5.1 cannot load", "export the bundle again with this version")


def test_a_program_for_a_delegate_that_is_not_there(bundle: Bundle, tmp_path: Path) -> None:
    folder = changed(
        bundle("demo", engine="executorch"),
        tmp_path / "b",
        lambda data: data.replace(b"XnnpackBackend", b"AnotherBackend"),
    )
    one_line(run(folder), "AnotherBackend", "export the bundle again")


def test_an_executorch_package_without_the_delegate(bundle: Bundle, tmp_path: Path) -> None:
    path = installed_without("backend_xnnpack", tmp_path)
    result = run(bundle("demo", engine="executorch"), PYTHONPATH=str(path))
    one_line(result, "executorch 1.5.1 has no XnnpackBackend", "install a build of it that does")


def test_no_executorch_package(bundle: Bundle) -> None:
    result = run(bundle("demo", engine="executorch"), first="sys.modules['executorch'] = None")
    one_line(result, "needs the ExecuTorch runtime", "pip install --no-deps executorch")


def test_a_packed_weights_file_that_is_not_as_it_was_written(
    bundle: Bundle, put_shim: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = bundle("demo", engine="executorch")
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    put_shim(tmp_path / "edgekv")
    fresh, again = run(folder, **cache), run(folder, **cache)
    assert (fresh.stderr, again.stderr) == ("", "")
    (packed,) = (tmp_path / "edgekv" / "packed").glob("*.bin")
    with packed.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)
    stale = run(folder, **cache)
    assert stale.stderr == f"edgekv: {packed} is not as it was written; the weights are packed again\n"
    assert stale.stdout == again.stdout == fresh.stdout
    assert run(folder, **cache).stderr == ""


def test_two_generators_at_once_and_a_kill_before_the_note_are_no_changed_file(
    bundle: Bundle, put_shim: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = bundle("demo", engine="executorch")
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    put_shim(tmp_path / "edgekv")
    twice = f"from edgekv.runtime.generate import Generator; other = Generator.open({str(folder)!r}); next(other.stream('It'))"
    both, again = run(folder, first=twice, **cache), run(folder, **cache)
    assert (both.stderr, again.stderr, both.stdout) == ("", "", again.stdout)
    (note,) = (tmp_path / "edgekv" / "packed").glob("*.json")
    note.unlink()
    killed = run(folder, **cache)
    assert (killed.stderr, killed.stdout) == ("", again.stdout)
    assert note.exists()


def test_a_manifest_of_another_decoder(bundle: Bundle, tmp_path: Path) -> None:
    folder = changed(bundle("demo", engine="executorch"), tmp_path / "b", lambda data: data)
    manifest = json.loads((folder / "manifest.json").read_text())
    heads = dict(manifest["model"], n_kv_heads=4)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "model": heads}))
    one_line(run(folder), "segment_0_t", "takes output k as float32 [", "2, 64], not float32 [", "4, 64]")
    layers = dict(manifest["model"], n_layers=5, windows=[0] * 5)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "model": layers}))
    one_line(run(folder), "has no method segment_4_t128; export the bundle again")


def test_each_documented_input_and_output_is_held_to_its_dtype_and_shape(bundle: Bundle) -> None:
    from edgekv.runtime.engines.executorch.library import load_library

    folder = bundle("demo", engine="executorch")
    model = read_manifest(folder).model
    program = load_library(cache_home()).open(folder / "model.pte", None)
    for index in (0, 1, model.n_layers):
        spec, method = segment_spec(model, index), program.method(f"segment_{index}_t1")
        good = [[np.zeros([1 if dim == "T" else int(dim) for dim in tensor.shape], np.float32) for tensor in side]
                for side in (spec.inputs, spec.outputs)]  # fmt: skip
        method.bind(spec, *good)
        for side, name in enumerate(("input", "output")):
            for place, tensor in enumerate((spec.inputs, spec.outputs)[side]):
                array = good[side][place]
                for bad in (array.astype(np.float64), array[0], np.concatenate([array, array]), array[..., 1:]):
                    given: list[list[Any]] = [list(arrays) for arrays in good]
                    given[side][place] = bad
                    with pytest.raises(EngineError) as error:
                        method.bind(spec, *given)
                    assert f"takes {name} {tensor.name} as float32 {list(array.shape)}, not {bad.dtype}" in str(
                        error.value
                    )
                    assert "\n" not in str(error.value)


def test_a_program_that_is_refused_leaves_the_process_able_to_run_another(bundle: Bundle, tmp_path: Path) -> None:
    folder = bundle("demo", engine="executorch")
    with pytest.raises(EngineError):
        Generator.open(changed(folder, tmp_path / "b", lambda data: data[:5000]))
    with Generator.open(folder, RunOptions(threads=2)) as generator:
        assert len(list(generator.tokens([104, 670, 47, 714], max_tokens=4))) == 4
