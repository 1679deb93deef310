"""`edgekv profiles calibrate`: what it writes is a valid profile of real measurements, made small so that they are quick."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from typer.testing import CliRunner

from edgekv.calibrate import compute, drive, engine
from edgekv.calibrate.onnx_chain import matmul_chain
from edgekv.cli.main import app
from edgekv.device_profiles import DeviceProfile, Quantity, load, user_dir
from edgekv.device_profiles.geometry import Geometry
from edgekv.device_profiles.work import step_work
from edgekv.errors import StoreError, UsageError
from edgekv.plan import Workload, make_plan, read_model
from edgekv.runtime.engines.onnx.options import set_up
from edgekv.spec import PageSpec


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the same things on less data."""
    for module, name, value in (
        (compute, "READ_BYTES", 1 << 20),
        (compute, "WIDTH", 64),
        (compute, "PRODUCTS", 4),
        (compute, "REPEATS", 1),
        (compute, "KV_TOKENS", 128),
        (compute, "KV_SPEC", PageSpec(2, 2, 32, 32)),
        (drive, "FILE_BYTES", 4 << 20),
        (drive, "SECONDS", 0.02),
        (engine, "CONTEXTS", (64, 512)),
        (engine, "FLASH_CONTEXTS", (256, 512)),
        (engine, "STEPS", 4),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(compute.attention_rates, "__defaults__", (compute.KV_SPEC, 4))


def calibrate(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["profiles", "calibrate", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return str(result.output)


def measured(profile: DeviceProfile) -> dict[str, Quantity[float]]:
    entries = profile.entries()
    return {key: entry for key, entry in entries.items() if isinstance(entry, Quantity) and entry.confidence == "high"}


@pytest.mark.usefixtures("small")
def test_without_a_name_the_profile_is_among_the_users_and_every_measured_number_says_how(tmp_path: Path) -> None:
    calibrate("--name", "bench-board", "--kind", "board", "--dir", str(tmp_path / "offload"))
    profile = load("bench-board")
    assert profile.path.parent == user_dir()
    assert profile.kind == "board"
    found = measured(profile)
    for key in (
        "memory.ram_bytes",
        "compute.onnx.weight_read_bytes_per_s",
        "compute.onnx.kv_read_bytes_per_s",
        "compute.onnx.kv_fp16_read_bytes_per_s",
        "compute.onnx.gemm_ops_per_s",
        "compute.onnx.attention_ops_per_s",
        "compute.onnx.int8.gemm_ops_per_s",
        "flash.read_t0_s",
        "flash.read_bytes_per_s",
        "flash.write_bytes_per_s",
        "flash.iops_limit",
    ):
        assert "edgekv profiles calibrate" in found[key].source
        assert datetime.date.today().isoformat() in found[key].source
    assert {"compute.onnx.overhead_s", "flash.endurance_tbw", "thermal.floor_share"}.isdisjoint(found)
    assert list((tmp_path / "offload").iterdir()) == []
    profile.path.unlink()


@pytest.mark.usefixtures("small")
def test_with_a_bundle_the_engine_is_measured_and_a_plan_is_as_sure_as_measurements(
    bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = bundle("demo", weights="int4"), tmp_path / "here.toml"
    shown = calibrate("--bundle", str(folder), "--out", str(out), "--dir", str(tmp_path / "offload"))
    assert "weight_read_bytes_per_s" in shown
    profile = load(out)
    assert {"compute.onnx.overhead_s", "compute.onnx.piece_fetch_s"} <= measured(profile).keys()
    plan = make_plan(read_model(folder), profile, Workload(512, 256))
    assert plan.fits
    assert plan.uncertainty == 0.15
    assert 1 < plan.decode_tokens_per_s < 1e5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "board.txt"), "must be named NAME.toml"),
        (("--out", "board.toml", "--name", "other"), "must be named other.toml"),
        (("--kind", "toaster"), "unknown kind 'toaster'"),
        (("--out", "here.toml", "--dir", "here/below"), "cannot make a file in .*here/below: .*; choose another with --dir"),
        (("--out", "here.toml", "--dir", "/proc"), "cannot make a file in /proc: .*; choose another with --dir"),
        (("--out", "/proc/x.toml"), "cannot write --out /proc/x.toml: /proc is no folder that can be written to"),
    ],
)  # fmt: skip
def test_a_request_that_makes_no_sense_is_refused_before_measuring(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekv.calibrate.calibration.read_bandwidth", lambda threads: pytest.fail("it measures"))
    (tmp_path / "here").write_text("", encoding="utf-8")
    arguments = tuple(word.replace("here", str(tmp_path / "here"), 1) for word in arguments)
    with pytest.raises(UsageError, match=message):
        calibrate(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_profile_is_not_overwritten_unasked(tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    out.write_text("precious", encoding="utf-8")
    with pytest.raises(UsageError, match="overwrite it with --force"):
        calibrate("--out", str(out))
    assert out.read_text(encoding="utf-8") == "precious"


@pytest.mark.usefixtures("small")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StoreError, match="choose another with --dir"):
        drive.measure_drive(tmp_path / "file" / "below")


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_the_model_written_by_hand_multiplies_as_numpy_does(bits: int) -> None:
    data = matmul_chain(64, 1, bits)
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    codes = tensors["w0"]
    if bits == 32:
        weight = codes
    else:
        low, high = codes & 15, codes >> 4
        values = np.stack([low, high], axis=-1).reshape(64, 2, 32) if bits == 4 else codes
        scaled = (values.astype(np.float32) - 2 ** (bits - 1)) * tensors["s0"][:, :, None]
        weight = scaled.reshape(64, 64).T
    x = np.random.default_rng(1).standard_normal((3, 64), np.float32)
    options = set_up(bits == 4, 1, own_process=False).options
    (y,) = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, {"x0": x})
    np.testing.assert_allclose(y, x @ weight, atol=0.02 * np.abs(x @ weight).max())


def test_latency_is_what_is_left_of_a_request_without_its_bytes() -> None:
    times = {size: 380e-6 + size / 89e6 for size in (4096, 65536, 1 << 20)}
    assert drive.latency(times) == pytest.approx(380e-6, rel=1e-6)
    assert drive.latency({size: size / 1e9 for size in (4096, 1 << 20)}) == pytest.approx(0, abs=1e-12)


def test_rates_are_recovered_from_the_times_that_they_would_give() -> None:
    shape = Geometry(4, 256, 4, 2, 64, 1000, 4096, 3 * 256 * 768, 3 * 256 * 768, (0,) * 4)
    chunks = []
    for context in (0, 1024, 4096):
        work = step_work(
            shape, n_tokens=engine.CHUNK, context=context, bits_per_weight=8, kv_bytes_per_token=0, logits=0
        )
        chunks.append(engine.Timed(context, 0.002 + work.ops / 2e11 + work.attention_ops / 3e11))
    gemm, attention = engine.fit_chunks(shape, chunks, 0.002)
    assert gemm == pytest.approx(2e11, rel=1e-6)
    assert attention == pytest.approx(3e11, rel=1e-6)
    fp16, int8 = ([engine.Timed(at, 0.015 + at * slope) for at in (64, 2048, 8192)] for slope in (2e-6, 1e-6))
    assert engine.fit_tokens(fp16, int8) == pytest.approx((0.015, 2e-6, 1e-6))


COUNTS = [(264, 48), (920, 72), (3328, 216)]


@pytest.mark.parametrize("rates", [(1e-5, 9e-5), (2e-5, 0.0), (0.0, 3e-4)])
def test_what_a_page_costs_is_told_from_what_a_piece_costs(rates: tuple[float, float]) -> None:
    beyond = [pages * rates[0] + pieces * rates[1] for pages, pieces in COUNTS]
    fetches = [engine.Fetched(*count, 0.01 + one, one) for count, one in zip(COUNTS, beyond, strict=True)]
    assert engine.fit_fetches(fetches) == pytest.approx(rates, abs=1e-9)
    assert min(engine.fit_fetches([engine.Fetched(*count, 1e-2, 1e-3) for count in COUNTS])) >= 0
    assert engine.fit_fetches([]) == (0.0, 0.0)


@pytest.mark.parametrize(("waited_s", "fits"), [(0.05, True), (0.01, False)])
def test_a_token_that_waits_for_the_drive_bounds_what_the_host_does(waited_s: float, fits: bool) -> None:
    *others, longest = ((*count, count[0] * 5e-6 + count[1] * 5e-5) for count in COUNTS)
    fetches = [engine.Fetched(pages, pieces, 0.01 + one, one) for pages, pieces, one in others]
    fetches.append(engine.Fetched(longest[0], longest[1], 0.01 + waited_s, waited_s, waits=True))
    page_s, piece_s = engine.fit_fetches(fetches)
    assert ((page_s, piece_s) == pytest.approx((5e-6, 5e-5))) == fits
    assert longest[0] * page_s + longest[1] * piece_s < longest[2] * 1.01


def test_a_model_with_a_short_context_is_measured_at_shorter_ones() -> None:
    assert engine.shortened((64, 2048, 8192), 100_000) == [64, 2048, 8192]
    assert engine.shortened((64, 2048, 8192), 2048) == [16, 512, 2048]
