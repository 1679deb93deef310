"""A bundle appears whole or not at all, says what it is, and a damaged one is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgekv.bundle import check_files, read_manifest
from edgekv.cli.main import app
from edgekv.contract import default_weights
from edgekv.errors import BundleError, UsageError
from edgekv.export import export_model

Bundle = Callable[..., Path]
Checkpoint = Callable[[str], Path]


@pytest.fixture
def copy(checkpoint: Checkpoint, bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle to change."""
    return Path(shutil.copytree(bundle(checkpoint("llama")), tmp_path / "copy.edgekv"))


def test_the_manifest_describes_the_bundle(checkpoint: Checkpoint, bundle: Bundle) -> None:
    folder = bundle(checkpoint("llama"))
    manifest = read_manifest(folder)
    assert (manifest.engine, manifest.form, manifest.weights, manifest.page_size) == ("onnx", "split", "fp32", 16)
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert manifest.chat_template == "chat_template.jinja"
    assert (folder / "tokenizer.json").read_bytes() == (checkpoint("llama") / "tokenizer.json").read_bytes()
    check_files(folder, manifest)


def test_the_source_hash_names_the_checkpoint_not_the_export(checkpoint: Checkpoint, bundle: Bundle) -> None:
    source = checkpoint("llama")
    hashes = {
        read_manifest(bundle(source, form, weights)).source_sha256
        for form, weights in (("split", "fp32"), ("inline", "fp32"), ("split", "int4"))
    }
    assert len(hashes) == 1
    assert hashes != {read_manifest(bundle(checkpoint("llama-tied"))).source_sha256}


def test_an_export_is_reproducible(checkpoint: Checkpoint, bundle: Bundle, tmp_path: Path) -> None:
    source = checkpoint("llama")
    again = export_model(source, tmp_path / "again", engine="onnx", weights="int4", page_size=16, calibration="none")
    assert again.files == read_manifest(bundle(source, "split", "int4")).files


def test_weights_are_chosen_by_size_when_not_given(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert (default_weights(99_999_999), default_weights(100_000_000)) == ("fp32", "int4")
    assert export_model(checkpoint("llama"), tmp_path / "out").weights == "fp32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tensorrt"}, "engine 'tensorrt' is not known"),
        ({"form": "whole"}, "form 'whole' is not known"),
        ({"weights": "int3"}, "weights must be one of int4, .* not 'int3'"),
        ({"page_size": 33}, "page_size 33"),
    ],
)
def test_an_unknown_option_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        export_model("demo", tmp_path / "out", **options)  # type: ignore[arg-type]


def test_an_existing_bundle_is_replaced_only_by_force(checkpoint: Checkpoint, copy: Path) -> None:
    before = read_manifest(copy)
    with pytest.raises(UsageError, match="--force"):
        export_model(checkpoint("llama"), copy, weights="int8")
    assert read_manifest(copy) == before
    assert export_model(checkpoint("llama"), copy, weights="int8", force=True).weights == "int8"
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_force_never_removes_what_is_not_a_bundle(checkpoint: Checkpoint, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="not a bundle"):
        export_model(checkpoint("llama"), home, force=True)
    assert (home / "letter.txt").read_text() == "dear"


def test_an_interrupted_export_leaves_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def interrupt(step: str, done: int, total: int) -> None:
        if step.startswith("segment 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(checkpoint("llama"), tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["split", "inline"])
def test_progress_counts_to_the_end(form: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    export_model(checkpoint("llama"), tmp_path / form, form=form, progress=lambda _, *counts: seen.append(counts))
    assert [done for done, _ in seen] == list(range(len(seen)))
    assert {total for _, total in seen[1:]} == {len(seen) - 1}


def test_a_damaged_bundle_is_refused(copy: Path) -> None:
    manifest = read_manifest(copy)
    data = bytearray((copy / "weights.bin").read_bytes())
    data[5000] ^= 1
    (copy / "weights.bin").write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.bin differs from its sha256"):
        check_files(copy, manifest)
    (copy / "weights.bin").write_bytes(data[:-1])
    with pytest.raises(BundleError, match="the manifest says"):
        check_files(copy, manifest)
    (copy / "segment_1.onnx").unlink()
    with pytest.raises(BundleError, match=r"segment_1\.onnx is missing"):
        check_files(copy, manifest)


def test_a_newer_or_damaged_manifest_is_refused(copy: Path, tmp_path: Path) -> None:
    path = copy / "manifest.json"
    data = json.loads(path.read_text())
    for text, message in (
        (json.dumps({**data, "format_version": 99}), "has bundle format 99"),
        (json.dumps({**data, "colour": "red"}), "is damaged"),
        ("{", "is damaged"),
    ):
        path.write_text(text)
        with pytest.raises(BundleError, match=message):
            read_manifest(copy)
    with pytest.raises(BundleError, match="is not a bundle"):
        read_manifest(tmp_path)


def test_the_commands_export_and_inspect(checkpoint: Checkpoint, tmp_path: Path) -> None:
    out, runner = tmp_path / "out.edgekv", CliRunner()
    result = runner.invoke(app, ["export", str(checkpoint("llama")), "--out", str(out), "--weights", "int8", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["weights"] == "int8"
    shown = runner.invoke(app, ["inspect", str(out), "--verify"], env={"COLUMNS": "160"})
    assert shown.exit_code == 0
    assert all(
        word in shown.stdout for word in ("query heads", "segment_0.onnx", "next_residual", "weights.bin", "match")
    )
    facts = json.loads(runner.invoke(app, ["inspect", str(out), "--json"]).stdout)
    assert facts["kv_bytes_per_token"]["fp16"] == 4 * 3 * 2 * 32


def test_exporting_without_torch_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from edgekv.errors import EngineMissing\n"
        "from edgekv.export import export_model\n"
        "from pathlib import Path\n"
        "try: export_model('demo', Path(sys.argv[1]))\n"
        "except EngineMissing as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert 'pip install "edgekv[export]"' in result.stdout


def test_inspect_shows_the_inline_form(checkpoint: Checkpoint, bundle: Bundle) -> None:
    folder = bundle(checkpoint("mistral-window"), "inline")
    shown = CliRunner().invoke(app, ["inspect", str(folder)], env={"COLUMNS": "160"})
    assert "key_pages.{l}" in shown.stdout
    assert dataclasses.asdict(read_manifest(folder).model)["windows"] == (24, 24, 24)
