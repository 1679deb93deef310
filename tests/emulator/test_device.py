"""The device itself: a fixture for the tests of apps, its memory, its drive, its time, and a real jail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekv.device_profiles import load
from edgekv.device_profiles.geometry import Geometry
from edgekv.device_profiles.speed import step_seconds
from edgekv.device_profiles.work import step_work
from edgekv.emulator import AppKilled, Device, Event
from edgekv.emulator.charges.cost import StepCost
from edgekv.errors import BudgetError, StoreError, StoreFull
from edgekv.runtime.generate import Generator, RunOptions


@pytest.fixture
def phone() -> Iterator[Device]:
    """A 4 GB Android phone with a slow eMMC that kills at 1.2 GB."""
    with Device("android-low-4gb", app_limit="1.2GB") as device:
        yield device


def test_a_device_changes_time_and_no_token(phone: Device, tiny: Path) -> None:
    prompt = [*range(2, 250), *range(3, 200)]
    with Generator.open(tiny, RunOptions(kv_budget="30%", prefixes=False)) as plain:
        expected = list(plain.tokens(prompt, max_tokens=20))
    with phone.open(tiny, kv_budget="30%") as generator:
        assert list(generator.tokens(prompt, max_tokens=20)) == expected
        report = generator.report()
    assert report.pages is not None
    assert phone.pages_fetched == report.pages.pages_fetched > 0
    assert phone.peak_bytes < phone.limit_bytes == 1_200_000_000
    assert report.decode_tokens_per_s == pytest.approx(report.decode_tokens / report.decode_seconds)
    assert report.peak_rss_bytes == phone.peak_bytes


def test_an_app_that_grows_beyond_its_limit_is_killed_and_cannot_catch_it(tiny: Path) -> None:
    device = Device("android-low-4gb", app_limit="162.5MiB")

    def careful_app() -> None:
        with device.open(tiny, kv_budget="64MiB", kv="fp16") as generator, contextlib.suppress(Exception):
            list(generator.tokens(list(range(2, 300)) * 3, max_tokens=8))

    with pytest.raises(AppKilled, match="lmkd"):
        careful_app()
    assert device.peak_bytes > device.limit_bytes


def test_an_app_answers_memory_pressure_in_time(tiny: Path, tmp_path: Path) -> None:
    device = Device("android-low-4gb", app_limit="300MiB")
    prompt = [*range(2, 300)] * 2
    with device.open(tiny, kv_budget="2MiB", offload=tmp_path, context=900, kv="int8") as generator:
        generator.prefill(prompt, max_tokens=60)
        device.schedule(Event(device.now(), "memory-pressure", limit="163MiB", grace_s=0.5))
        for token in range(40):
            generator.step([token + 2])
    assert [entry.kind for entry in device.timeline.entries] == ["memory-pressure", "reclaim"]


def test_a_full_drive_is_a_full_store_with_the_store_s_own_words(phone: Device, tiny: Path) -> None:
    phone.schedule(Event(0.0, "disk-full"))
    with phone.open(tiny, kv_budget="30%") as generator, pytest.raises(StoreFull, match="offload folder"):
        list(generator.tokens([*range(2, 300)] * 2, max_tokens=8))


@pytest.mark.parametrize("kind", ["read-errors", "damage"])
def test_a_failing_drive_ends_a_run_with_an_error_and_never_with_a_wrong_token(
    kind: str, phone: Device, tiny: Path
) -> None:
    prompt = [*range(2, 300)] * 2
    with phone.open(tiny, kv_budget="30%") as generator:
        expected = list(generator.tokens(prompt, max_tokens=20))
    said: list[int] = []
    with phone.open(tiny, kv_budget="30%") as generator:
        phone.schedule(Event(phone.now() + 0.1, kind, rate=0.02))
        with pytest.raises(StoreError):
            said.extend(generator.tokens(prompt, max_tokens=20))
    assert said == expected[: len(said)]


def test_nothing_is_left_for_a_cache_on_a_device_that_is_too_small(tiny: Path) -> None:
    with pytest.raises(BudgetError, match="no memory left"):
        Device("android-low-4gb", app_limit="100MiB").open(tiny)


def test_heat_slows_a_device_and_rest_cools_it(phone: Device) -> None:
    phone.schedule(Event(1.0, "heat", share=1.0))
    phone.rest(1.0)
    floor = phone.profile.thermal.floor_share.value
    assert phone.clock.heat.speed == pytest.approx(floor)
    phone.rest(20 * phone.profile.thermal.time_constant_s.value)
    assert phone.clock.heat.speed == pytest.approx(1.0, abs=1e-6)


MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
LINEAR = {
    "full_attention_interval": 4,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}


@pytest.mark.parametrize(("tokens", "context"), [(1, 2048), (256, 0)])
@pytest.mark.parametrize("parts", [{}, MIXTURE, {**MIXTURE, **LINEAR}], ids=["dense", "experts", "linear attention"])
def test_the_pieces_of_a_step_cost_what_the_profile_s_formula_says(
    config_json: dict[str, Any], parts: dict[str, Any], tokens: int, context: int
) -> None:
    profile, model = load("galaxy-s24-8gb"), Geometry.from_config({**config_json, **parts})
    cost = StepCost.of(profile, model, "onnx", "int4", 32)
    per_token = cost.pages.n_layers * cost.slot_bytes[1]
    pairs = tokens * context + tokens * (tokens + 1) / 2
    pieces = model.n_kv_layers * (cost.segment(tokens) + cost.attention(0.0, context, pairs)) + cost.head(1)
    work = step_work(
        model, n_tokens=tokens, context=context, bits_per_weight=cost.bits_per_weight, kv_bytes_per_token=per_token
    )
    assert pieces == pytest.approx(step_seconds(work, profile.rates("onnx", "int4")).total, rel=0.02)
