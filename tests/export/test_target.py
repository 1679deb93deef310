"""`export --target` chooses for the device of a profile, whatever machine exports; `run` says what was made for another kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekv.bundle import read_manifest
from edgekv.cli.main import run_command_line
from edgekv.device_profiles import DeviceProfile, load, names
from edgekv.device_profiles.geometry import Geometry
from edgekv.errors import BudgetError, UsageError
from edgekv.export import choose_engine, target
from edgekv.export.choose_engine import slow_on
from edgekv.export.target import choose_for
from edgekv.host import MACHINES, machine_class
from edgekv.spec import RUNTIME_OVERHEAD_BYTES

Capture = pytest.CaptureFixture[str]
PI, VNNI = "raspberry-pi-5-8gb", "laptop-ryzen-ai-5-340-16gb"
#: Of the shapes of Llama 3.2 1B, and of a model of 78 million parameters.
LARGE = Geometry(16, 2048, 32, 8, 64, 128256, 131072, 3 * 2048 * 8192, 3 * 2048 * 8192, (0,) * 16, tied_embeddings=True)
SMALL = Geometry(8, 768, 12, 12, 64, 8000, 4096, 3 * 768 * 2560, 3 * 768 * 2560, (0,) * 8)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_engine, "executorch_installed", lambda: True)
    monkeypatch.setattr(target, "executorch_installed", lambda: True)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return what makes this machine one of another class."""

    def be(name: str) -> None:
        for module in ("edgekv.host", "edgekv.export.choose_engine", "edgekv.export.bundle_writer", "edgekv.cli.run"):
            monkeypatch.setattr(f"{module}.machine_class", lambda: name)

    return be


def test_every_bundled_profile_says_what_processor_the_device_has() -> None:
    assert {load(name).processor for name in names()} <= set(MACHINES)


@pytest.mark.usefixtures("installed")
def test_a_board_gets_the_engine_that_its_profile_says_is_faster_on_operators_that_run_there() -> None:
    choice = choose_for(load(PI), LARGE, "split")
    assert (choice.engine, choice.operators, choice.weights) == ("executorch", "xnnpack", "int4")
    assert choice.reason.startswith(
        f"for {PI} (arm64, dotprod): executorch with xnnpack operators, int4 weights: the profile"
    )
    assert choice.reason.endswith("(confidence low)")


@pytest.mark.usefixtures("installed")
def test_where_machines_like_the_device_were_measured_the_measurement_decides() -> None:
    choice = choose_for(load(VNNI), LARGE, "split")
    assert (choice.engine, choice.operators) == ("executorch", "edgekv")
    assert "measured fastest" in choice.reason


def test_an_engine_that_cannot_be_exported_for_here_is_named_with_the_way_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(target, "executorch_installed", lambda: False)
    choice = choose_for(load(PI), LARGE, "split")
    assert (choice.engine, choice.operators) == ("onnx", None)
    assert "not installed: pip install" in choice.reason


@pytest.mark.usefixtures("installed")
def test_what_is_asked_for_is_taken_and_the_rest_is_for_the_device() -> None:
    assert choose_for(load(VNNI), LARGE, "split", engine="executorch").operators == "edgekv"
    assert choose_for(load(VNNI), LARGE, "split", engine="executorch", weights="int8").operators == "xnnpack"
    assert choose_for(load(PI), LARGE, "split", engine="executorch").operators == "xnnpack"
    assert choose_for(load(PI), LARGE, "split", operators="edgekv").engine == "executorch"
    assert choose_for(load(PI), LARGE, "split", engine="onnx", weights="fp16").weights == "fp16"
    assert choose_for(load(PI), LARGE, "inline").engine == "onnx"


def tight(app_limit_bytes: int) -> DeviceProfile:
    device = load(PI)
    limit = replace(device.memory.app_limit_bytes, value=app_limit_bytes)
    return replace(device, memory=replace(device.memory, app_limit_bytes=limit))


@pytest.mark.usefixtures("installed")
def test_weights_that_do_not_fit_the_device_are_smaller_ones_or_refused() -> None:
    assert choose_for(load(PI), SMALL, "split").weights == "fp32"
    room = int((RUNTIME_OVERHEAD_BYTES + 1.4 * SMALL.parameters) / 0.9)  # a byte for each, and not two
    choice = choose_for(tight(room), SMALL, "split")
    assert choice.weights == "int8"
    assert choice.reason.endswith("fp32 weights do not fit its memory")
    with pytest.raises(BudgetError, match="has no memory left for the KV cache"):
        choose_for(tight(room), SMALL, "split", weights="fp32")
    with pytest.raises(BudgetError, match="has no memory left for the KV cache"):
        choose_for(tight(100 * 2**20), SMALL, "split")


def test_a_profile_that_names_no_processor_is_refused_with_what_to_write() -> None:
    with pytest.raises(
        UsageError, match='does not say what processor the device has; add a line such as processor = "arm64'
    ):
        choose_for(replace(load(PI), processor=None), LARGE, "split")


def test_a_warning_is_one_for_the_device_alone() -> None:
    for machine_name in MACHINES:
        vnni = machine_name == "x86-64, AVX-512 VNNI"
        kernels = vnni or machine_name.startswith("arm64")
        assert (slow_on("executorch", "split", "int4", "edgekv", machine_name) is None) == kernels
        assert (slow_on("onnx", "split", "int4", None, machine_name) is None) == kernels
        assert (slow_on("executorch", "split", "int4", "xnnpack", machine_name) is None) != vnni


def export(*words: str) -> int:
    return run_command_line(["export", "demo", "--calibration", "none", *words])


def test_the_command_says_what_it_chose_and_the_manifest_for_what(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "pi.edgekv"
    assert export("--weights", "int4", "--engine", "onnx", "--target", PI, "--out", str(out)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("for ")]
    assert said == [f"for {PI} (arm64, dotprod): onnx, int4 weights: as asked"]
    assert read_manifest(out).made_for == "arm64, dotprod"


def test_without_a_target_a_bundle_is_made_for_this_machine_unless_its_engine_was_given(tmp_path: Path) -> None:
    assert run_command_line(["export", "demo", "--out", str(tmp_path / "a.edgekv")]) == 0
    assert run_command_line(["export", "demo", "--engine", "onnx", "--out", str(tmp_path / "b.edgekv")]) == 0
    assert read_manifest(tmp_path / "a.edgekv").made_for == machine_class()
    assert read_manifest(tmp_path / "b.edgekv").made_for is None


@pytest.mark.parametrize("words", [["--target", "nope"], ["--target", "OLD"]])
def test_a_target_that_cannot_be_used_is_refused_before_any_work(
    words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    old = tmp_path / "old.toml"
    lines = load(PI).path.read_text(encoding="utf-8").replace(f'name = "{PI}"', 'name = "old"').splitlines()
    old.write_text("\n".join(line for line in lines if not line.startswith("processor")), encoding="utf-8")
    assert (
        run_command_line(
            ["export", "demo", "--out", str(tmp_path / "o.edgekv"), words[0], words[1].replace("OLD", str(old))]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert said.startswith("edgekv: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "o.edgekv").exists()


@pytest.mark.parametrize(
    ("made_for", "weights", "form", "says"),
    [
        ("arm64, dotprod", "int4", "split", True),
        ("x86-64, AVX2", "int4", "split", False),
        (None, "int4", "split", False),
        ("arm64, dotprod", "fp32", "split", False),
        ("arm64, dotprod", "int4", "inline", False),
    ],
)
def test_run_says_in_one_line_when_a_bundle_was_made_for_another_kind_of_processor(
    made_for: str | None,
    weights: str,
    form: str,
    says: bool,
    bundle: Callable[..., Path],
    machine: Callable[[str], None],
    tmp_path: Path,
    capsys: Capture,
) -> None:
    copy = tmp_path / "m.edgekv"
    shutil.copytree(bundle("demo", form, weights), copy)
    manifest: dict[str, Any] = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    (copy / "manifest.json").write_text(json.dumps({**manifest, "made_for": made_for}), encoding="utf-8")
    machine("x86-64, AVX2")
    assert run_command_line(["run", str(copy), "--prompt", "It was", "-n", "2", "--quiet"]) == 0
    said = capsys.readouterr().err.splitlines()
    expected = (
        f"edgekv: {copy} was made for arm64, dotprod (onnx), and this is x86-64, AVX2: it may be slow; export it with"
    )
    assert [line.startswith(expected) for line in said] == ([True] if says else [])
