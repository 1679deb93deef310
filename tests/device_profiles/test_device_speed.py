"""How long a device takes: the roofline, the paging cliff, heat."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv.device_profiles import load
from edgekv.device_profiles.geometry import Geometry
from edgekv.device_profiles.speed import paged_seconds, step_seconds
from edgekv.device_profiles.thermal import ThermalState, sustained_speed
from edgekv.device_profiles.work import StepWork, step_work, weights_bytes

PI = load("raspberry-pi-5-8gb")
PHONE = load("galaxy-s24-8gb")
RATES = PI.rates("executorch", "int4")
MISTRAL_7B = Geometry(32, 4096, 32, 8, 128, 32768, 32768, 3 * 4096 * 14336, 3 * 4096 * 14336, (0,) * 32)


def test_decode_is_bound_by_bytes_and_prefill_by_operations() -> None:
    decode = step_work(MISTRAL_7B, n_tokens=1, context=0, bits_per_weight=8.5, kv_bytes_per_token=0)
    prefill = step_work(MISTRAL_7B, n_tokens=512, context=0, bits_per_weight=8.5, kv_bytes_per_token=0, logits=0)
    assert step_seconds(decode, RATES).dense == decode.weight_bytes / 10e9
    assert step_seconds(prefill, RATES).dense == prefill.ops / 180e9


def test_a_published_decode_rate_comes_out_of_the_profile() -> None:
    # llama-bench on a Pi 5, Mistral 7B Q8_0: 1.29 tokens/s (nyunai edge-llm-leaderboard).
    work = step_work(MISTRAL_7B, n_tokens=1, context=64, bits_per_weight=8.5, kv_bytes_per_token=131072)
    assert 1 / step_seconds(work, RATES).total == pytest.approx(1.29, rel=0.1)


def test_the_parts_of_a_step_add_up() -> None:
    seconds = step_seconds(StepWork(1e9, 1e9, 5e8, 1e9), RATES)
    assert (seconds.dense, seconds.attention, seconds.overhead) == (0.1, 0.1, 0.0005)
    assert seconds.total == pytest.approx(0.2005)


@given(speed=st.floats(0.05, 1.0))
def test_a_hot_device_takes_longer_by_what_heat_has_left_of_its_speed(speed: float) -> None:
    work = StepWork(1e9, 1e12, 1e8, 1e9)
    assert step_seconds(work, RATES, speed).total == pytest.approx(step_seconds(work, RATES).total / speed)


@given(
    work=st.builds(StepWork, *[st.floats(0, 1e12)] * 4),
    more=st.sampled_from([field.name for field in dataclasses.fields(StepWork)]),
)
def test_more_work_never_takes_less_time(work: StepWork, more: str) -> None:
    larger = dataclasses.replace(work, **{more: getattr(work, more) * 2 + 1})
    assert step_seconds(larger, RATES).total >= step_seconds(work, RATES).total


@pytest.mark.parametrize("profile", ["raspberry-pi-5-8gb", "raspberry-pi-5-8gb-nvme", "raspberry-pi-5-8gb-nvme-gen3"])
def test_on_a_pi_5_a_model_slightly_larger_than_memory_falls_by_more_than_twenty_times(profile: str) -> None:
    # Published (nyunai, llama.cpp, 8 GB board): a file of 8.09 GB runs at 1.30 tokens/s, one of 8.57 GB at 0.020: 65 times.
    device = load(profile)
    limit = device.memory.app_limit_bytes.value

    def tokens_per_s(share_of_limit: float) -> float:
        bits = 8 * share_of_limit * limit / MISTRAL_7B.parameters
        work = step_work(MISTRAL_7B, n_tokens=1, context=0, bits_per_weight=bits, kv_bytes_per_token=0)
        paged = paged_seconds(weights_bytes(MISTRAL_7B, bits), limit, device.flash)
        return 1 / (step_seconds(work, device.rates("executorch", "int8")).total + paged)

    fits, exceeds = tokens_per_s(0.99), tokens_per_s(1.05)
    assert 1 < fits < 2
    assert fits / exceeds > (20 if profile != "raspberry-pi-5-8gb-nvme-gen3" else 10)  # Gen 3 has twice the bandwidth


def test_below_the_limit_paging_costs_nothing() -> None:
    assert paged_seconds(7e9, 7e9, PI.flash) == 0
    assert paged_seconds(7e9 + 1, 7e9, PI.flash) > 70


def test_speed_under_load_decays_to_the_floor_and_comes_back_when_idle() -> None:
    state = ThermalState(PHONE.thermal)
    assert state.speed == 1
    state.advance(65)
    assert state.speed == pytest.approx(0.5 + 0.5 * math.exp(-1))
    state.advance(10_000)
    assert state.speed == pytest.approx(0.5)
    state.advance(65, load=0)
    assert state.speed == pytest.approx(1 - 0.5 * math.exp(-1))


@given(steps=st.lists(st.tuples(st.floats(0, 500), st.floats(0, 1)), max_size=8))
def test_speed_stays_between_floor_and_one_whatever_the_history(steps: list[tuple[float, float]]) -> None:
    state = ThermalState(PHONE.thermal)
    for seconds, load_share in steps:
        state.advance(seconds, load_share)
        assert 0.5 <= state.speed <= 1


@given(parts=st.lists(st.floats(0.001, 50), min_size=1, max_size=10))
def test_heat_does_not_depend_on_how_the_time_is_cut(parts: list[float]) -> None:
    state = ThermalState(PHONE.thermal)
    for seconds in parts:
        state.advance(seconds)
    assert state.speed == pytest.approx(sustained_speed(PHONE.thermal, sum(parts)))


def test_a_cooled_device_keeps_its_speed() -> None:
    assert sustained_speed(PI.thermal, 3600) == 1


def test_the_thermal_model_meets_the_published_check_points_of_an_iphone() -> None:
    # iPhone 17 Pro, MLX: 48 -> 18 tokens/s after ten minutes, 25 % lost after 35 s (john-rocky/apple-silicon-llm-bench).
    thermal = dataclasses.replace(
        PHONE.thermal,
        floor_share=dataclasses.replace(PHONE.thermal.floor_share, value=0.38),
        time_constant_s=dataclasses.replace(PHONE.thermal.time_constant_s, value=65.0),
    )
    assert 48 * sustained_speed(thermal, 600) == pytest.approx(18, rel=0.05)
    assert sustained_speed(thermal, 35) == pytest.approx(0.75, abs=0.03)
