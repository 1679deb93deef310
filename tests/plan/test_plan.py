"""`edgekv plan`: what it says of memory is what the runtime does; what it recommends can be run."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgekv.bundle import read_manifest
from edgekv.cli.main import app
from edgekv.device_profiles import DeviceProfile, Quantity, load
from edgekv.errors import BundleError, UsageError
from edgekv.plan import Workload, advise, make_plan, read_model
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.tiers import KVMode

LLAMA_3B = {
    "model_type": "llama",
    "num_hidden_layers": 28,
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
PI, PHONE = load("raspberry-pi-5-8gb"), load("galaxy-s24-8gb")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "Llama-3.2-3B" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LLAMA_3B), encoding="utf-8")
    return path


def command(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["plan", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("budget_kib", [None, 700, 250])
def test_pages_are_in_the_tiers_that_the_plan_says(bundle: Callable[..., Path], budget_kib: int | None) -> None:
    folder, tokens = bundle("demo"), 700
    budget = budget_kib * 1024 if budget_kib else None
    model = read_model(folder)
    plan = make_plan(model, PI, Workload(context=tokens, prompt=tokens, kv_budget=budget, kv=KVMode.AUTO))
    with Generator.open(folder, RunOptions(kv_budget=budget, context=tokens)) as generator:
        generator.prefill(list(range(3, 3 + tokens)), max_tokens=0)
        use = generator.report().cache
    assert use is not None
    assert plan.fits
    pages = {tier: count for tier, count in use.pages_by_tier.items() if count}
    per_page = model.geometry.n_layers / model.page_size
    planned = {tier: round(count * per_page) for tier, count in plan.tokens_by_tier.items() if count}
    assert planned.keys() == pages.keys()
    for tier, count in pages.items():
        assert abs(planned[tier] - count) <= model.geometry.n_layers + 2


@pytest.mark.parametrize(("made_for", "planned"), [(512, 512), (2048, 2048), (131072, 4096)])
def test_a_plan_takes_a_context_that_the_model_was_made_for(config: Path, made_for: int, planned: int) -> None:
    config.write_text(json.dumps({**LLAMA_3B, "max_position_embeddings": made_for}))
    done = CliRunner().invoke(app, ["plan", str(config), "--profile", "raspberry-pi-5-8gb", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["plan"]["workload"]["context"] == planned


def test_a_bundle_and_its_checkpoint_have_the_same_shape_and_nearly_the_same_weights(
    bundle: Callable[..., Path], checkpoint: Callable[[str], Path]
) -> None:
    source = checkpoint("llama-tied")
    exported = read_model(bundle(source, weights="int4"))
    estimated = read_model(source / "config.json", weights="int4")
    assert exported.exported
    assert not estimated.exported
    assert exported.geometry == estimated.geometry
    folder = bundle(source, weights="int4")
    model, rows = exported.geometry, read_manifest(folder).embedding
    assert rows is not None
    kept = (folder / "weights.bin").stat().st_size - rows.table_bytes(model.vocab_size, model.hidden_size)
    assert kept == pytest.approx(estimated.weights_bytes, rel=0.1)


def test_what_fits_stays_in_ram_and_what_does_not_goes_to_flash(config: Path) -> None:
    model = read_model(config, engine="executorch")
    small = make_plan(model, PHONE, Workload(4096, 3840))
    large = make_plan(model, PHONE, Workload(65536, 65280))
    assert small.fits
    assert small.resident
    assert small.bytes_by_tier["COLD"] == 0
    assert large.fits
    assert not large.resident
    assert sum(large.tokens_by_tier.values()) == 65536
    assert large.bytes_by_tier["HOT"] + large.bytes_by_tier["WARM"] <= large.kv_budget_bytes
    assert large.largest_exact == small.largest_exact
    assert make_plan(model, PHONE, Workload(large.largest_exact, 1)).resident
    assert not make_plan(model, PHONE, Workload(large.largest_exact + 32, 1)).resident
    assert large.largest_exact < large.largest_selective


def test_the_plan_of_a_phone_is_slower_when_it_is_hot(config: Path) -> None:
    plan = make_plan(read_model(config, engine="executorch"), PHONE, Workload(4096, 3840))
    assert plan.sustained_tokens_per_s == pytest.approx(plan.decode_tokens_per_s / 2, rel=0.01)


def test_flash_that_is_slower_than_the_kernel_bounds_the_speed(config: Path) -> None:
    plan = make_plan(read_model(config, engine="executorch"), load("raspberry-pi-5-4gb"), Workload(65536, 65280))
    assert plan.bound_by == "flash"
    read = plan.bytes_by_tier["COLD"] / 89e6
    assert 1 / plan.decode_tokens_per_s == pytest.approx(read, rel=0.1)


def test_weights_that_exceed_a_board_page_and_kill_a_phone(config: Path) -> None:
    model = read_model(config, weights="fp32", engine="executorch")
    board, phone = make_plan(model, PI, Workload(2048, 1024)), make_plan(model, PHONE, Workload(2048, 1024))
    assert not board.fits
    assert not phone.fits
    assert "no memory left for the KV cache" in str(board.problem)
    assert phone.decode_tokens_per_s == 0
    int4 = make_plan(read_model(config, engine="executorch"), PI, Workload(2048, 1024))
    assert int4.decode_tokens_per_s / board.decode_tokens_per_s > 20
    assert board.bound_by == "paging"


def test_writing_more_hours_a_day_wears_the_flash_in_proportion(config: Path) -> None:
    model = read_model(config, engine="executorch")
    one, eight = (make_plan(model, PHONE, Workload(65536, 65280, hours_per_day=hours)) for hours in (1.0, 8.0))
    assert eight.flash_bytes_per_day == pytest.approx(8 * one.flash_bytes_per_day)
    assert eight.years_of_life == pytest.approx(one.years_of_life / 8)


def test_a_plan_says_how_far_it_may_be_off_by_its_weakest_number(config: Path) -> None:
    model = read_model(config, engine="executorch")
    assert make_plan(model, PI, Workload(2048, 1024)).uncertainty == 0.4
    sure: dict[str, Any] = {
        key: replace(value, confidence="high")
        for key, value in vars(PI.compute["executorch"]).items()
        if isinstance(value, Quantity)
    }
    measured = replace(PI, compute={"executorch": replace(PI.compute["executorch"], **sure)})
    assert make_plan(model, measured, Workload(2048, 1024)).uncertainty == 0.15


@pytest.mark.parametrize(("context", "chosen"), [(4096, 4096), (4097, 131072)])
def test_an_export_that_must_be_told_the_context_is_told(context: int, chosen: int, tmp_path: Path) -> None:
    factors = {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48}
    phi = {
        "model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 32, "num_hidden_layers": 8, "vocab_size": 32064,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
        "rope_scaling": {"type": "longrope", **factors},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(phi), encoding="utf-8")
    advice = advise(read_model(tmp_path / "config.json"), PI, Workload(context, context // 2))
    assert f" --context {chosen} --out " in advice.commands[0]


@pytest.mark.parametrize(
    ("device", "weights", "context", "why", "fragment"),
    [
        (PI, "int4", 4096, "stay in RAM", "--profile raspberry-pi-5-8gb --context 4096"),
        (PI, "fp32", 4096, "int4 weights fit", "--weights int4"),
        (load("raspberry-pi-5-4gb"), "int4", 65536, "a quarter of the pages", "--attend selective:25%"),
        (load("iphone-se-3-4gb"), "fp16", 4096, "smaller model", ""),
    ],
)
def test_the_recommendation_fits_the_device(
    config: Path, device: DeviceProfile, weights: str, context: int, why: str, fragment: str
) -> None:
    advice = advise(read_model(config, weights=weights, engine="executorch"), device, Workload(context, context // 2))
    if not fragment:
        assert not advice.commands
    assert advice.plan.fits == bool(advice.commands)
    assert fragment in " && ".join(advice.commands)
    assert why in advice.why


def test_the_recommended_command_runs(bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = bundle("demo")
    data = json.loads(command(str(folder), "--profile", "raspberry-pi-5-8gb", "--context", "512", "--json"))
    (line,) = data["advice"]["commands"]
    words = [word for word in shlex.split(line)[1:] if word != "--chat"]
    result = CliRunner().invoke(app, [*words, "--prompt", "It was", "--max-tokens", "4", "--quiet"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("context", [2048, 16384, 32768, 65536])
def test_a_device_with_more_memory_is_never_planned_slower(config: Path, context: int) -> None:
    model = read_model(config)
    speeds = []
    for gigabytes in (4, 5, 6, 8, 12, 16, 24):
        limit = replace(PI.memory.app_limit_bytes, value=gigabytes * 10**9)
        device = replace(PI, memory=replace(PI.memory, app_limit_bytes=limit))
        speeds.append(make_plan(model, device, Workload(context, context // 2)).decode_tokens_per_s)
    assert all(larger >= 0.98 * smaller for smaller, larger in pairwise(speeds)), speeds


def test_int8_pages_are_recommended_where_fp16_ones_fit_and_are_slower(config: Path) -> None:
    model, workload = read_model(config), Workload(32768, 16384)
    auto = make_plan(model, load("jetson-agx-orin-64gb"), replace(workload, kv=KVMode.AUTO))
    advice = advise(model, load("jetson-agx-orin-64gb"), workload)
    assert auto.bytes_by_tier["WARM"] == 0
    assert advice.plan.decode_tokens_per_s > auto.decode_tokens_per_s
    assert "--kv int8" in advice.commands[-1]
    assert "faster than fp16" in advice.why
    short = advise(model, load("jetson-agx-orin-64gb"), Workload(64, 32))
    assert "--kv" not in short.commands[-1]
    asked = advise(model, load("jetson-agx-orin-64gb"), replace(workload, kv=KVMode.FP16))
    assert "--kv fp16" in asked.commands[-1]


def test_a_plan_of_an_inline_bundle_recommends_nothing_that_it_cannot_do(bundle: Callable[..., Path]) -> None:
    folder = bundle("demo", form="inline")
    with pytest.raises(UsageError, match="inline form takes every page"):
        command(str(folder), "--profile", "galaxy-s24-8gb", "--attend", "selective:25%")
    model = read_model(folder)
    for budget in (200, 400, 800, 2000):
        workload = Workload(4096, 2048, kv_budget=budget * 1024)
        assert "selective" not in " ".join(advise(model, PHONE, workload).commands)


def test_a_bundle_whose_weights_do_not_fit_names_no_folder_to_export_that_is_none(bundle: Callable[..., Path]) -> None:
    model = replace(read_model(bundle("demo")), weights_bytes=10**11)
    advice = advise(model, PHONE, Workload(512, 256))
    assert "export the checkpoint again with --weights int4" in advice.why
    assert not advice.commands


def test_a_profile_that_is_a_file_is_named_as_one(config: Path, tmp_path: Path) -> None:
    own = tmp_path / "my-board.toml"
    own.write_text('name = "my-board"\ntitle = "Mine"\nextends = "raspberry-pi-5-8gb"\n', encoding="utf-8")
    advice = advise(read_model(config), load(str(own)), Workload(2048, 1024))
    assert f"--profile {own} " in advice.commands[-1]


def test_a_context_beyond_the_model_is_planned_at_what_it_was_made_for(config: Path) -> None:
    model, workload = read_model(config), Workload(9999999, 9000000)
    plan, advice = make_plan(model, PHONE, workload), advise(model, PHONE, workload)
    assert plan.problem == "the model was made for 131072 tokens, not 9999999; lower --context"
    assert plan.workload.context == 131072
    assert "--context 131072" in advice.commands[-1]
    with pytest.raises(UsageError, match="above what the model was made for, 131072"):
        command(str(config), "--profile", "galaxy-s24-8gb", "--context", "9999999")


def test_a_context_that_no_prompt_and_answer_fit_is_not_planned(config: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(config), "--profile", "galaxy-s24-8gb", "--context", "8"])
    assert result.exit_code == 2
    assert "must be a whole number from 64" in result.output


def test_yarn_in_the_configuration_lengthens_the_context(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = {**LLAMA_3B, "max_position_embeddings": 32768, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    plan = make_plan(read_model(tmp_path), load("raspberry-pi-5-16gb"), Workload(100_000, 90_000))
    assert plan.fits
    assert plan.workload.context == 100_000


def test_the_table_names_model_device_tiers_speed_and_setting(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shown = command(str(config), "--profile", "galaxy-s24-8gb", "--context", "65536", "--engine", "executorch")
    for word in (
        "3.21 B parameters",
        "galaxy-s24-8gb",
        "COLD",
        "tokens/s at 65536",
        "10 minutes",
        "written a day",
        "edgekv run",
    ):
        assert word in shown, word


def test_the_matrix_has_a_line_for_every_profile_and_json_is_plain(config: Path) -> None:
    plans = json.loads(command(str(config), "--all-profiles", "--context", "8192", "--json"))
    assert len(plans) >= 20
    assert {plan["fits"] for plan in plans} == {True, False}
    assert all(plan["years_of_life"] is None or math.isfinite(plan["years_of_life"]) for plan in plans)
    shown = command(str(config), "--all-profiles", "--context", "8192")
    assert all(plan["profile"] in shown for plan in plans)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", "neither a bundle"),
        (lambda folder: (folder / "config.json").write_text("{") and folder, "cannot be read as JSON"),
        (lambda folder: (folder / "config.json").write_text("[]") and folder, "does not hold a JSON object"),
        (lambda folder: (folder / "config.json").write_text("{}") and folder, "unknown architecture None"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read_model(make(tmp_path))


def test_a_damaged_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BundleError):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--profile NAME or --all-profiles"),
        (("--profile", "pixel-8-8gb", "--prompt", "9000"), "more than --context"),
        (("--profile", "pixel-8-8gb", "--attend", "selective:64"), "needs a share"),
        (("--profile", "pixel-8-8gb", "--engine", "tvm"), "unknown engine"),
        (
            ("--profile", "pixel-8-8gb", "--engine", "onnx-cuda"),
            "edgekv does not run it yet; use one of onnx, executorch",
        ),
    ],
)
def test_a_request_that_makes_no_sense_is_one_line(config: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        command(str(config), *arguments)
