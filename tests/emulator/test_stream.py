"""Pages that stream natively, in virtual time: against times computed by hand, and two ways that must agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgekv.device_profiles import load
from edgekv.device_profiles.geometry import Geometry
from edgekv.device_profiles.schema import DeviceProfile, Quantity
from edgekv.emulator import Device, Event
from edgekv.emulator.charges.cost import StepCost
from edgekv.emulator.charges.meter import DeviceMeter
from edgekv.emulator.charges.native_walk import NativeWalk
from edgekv.emulator.clock import Clock
from edgekv.emulator.drive import EmulatedMedium
from edgekv.emulator.events import Agenda
from edgekv.errors import CorruptPage, StoreError
from edgekv.runtime.attention.native_walk import Streaming
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.tiers import Tier

PROMPT = [*range(2, 250), *range(3, 200)]
needs_native = pytest.mark.skipif(load_kernels().isa() == "numpy", reason="only the native kernels stream")


def steps(device: Device, bundle: Path, budget: str = "30%", count: int = 12) -> tuple[list[int], float]:
    """Return the tokens of an answer whose pages stream from flash, and its virtual seconds."""
    with device.open(bundle, kv_budget=budget) as generator:
        tokens = list(generator.tokens(PROMPT, max_tokens=1))
        assert generator.cache is not None
        on_flash = (generator.cache.table.tier == Tier.COLD).any(axis=1)
        assert on_flash.any()
        assert on_flash.all() == (budget == "30%")
        began = device.now()
        for _ in range(count):
            tokens.append(int(generator.step([tokens[-1]]).argmax()))
        return tokens, device.now() - began


@pytest.fixture
def phone() -> Iterator[Device]:
    with Device("android-low-4gb") as device:
        yield device


@needs_native
@pytest.mark.parametrize("budget", ["30%", "58%"], ids=["of every layer", "of some layers"])
def test_a_step_charged_as_a_whole_takes_exactly_what_its_layers_take_one_by_one(
    budget: str, phone: Device, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = steps(phone, tiny, budget)
    monkeypatch.setattr(DeviceMeter, "whole_tokens", False)
    with Device("android-low-4gb") as other:
        assert steps(other, tiny, budget) == together
        assert other.timeline.columns() == phone.timeline.columns()


@needs_native
def test_streaming_natively_takes_a_little_less_than_walking_piece_by_piece(
    phone: Device, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, seconds = steps(phone, tiny)
    monkeypatch.setattr(Streaming, "reaches", lambda self, tiers: False)
    with Device("android-low-4gb") as other:
        same, walked = steps(other, tiny)
    assert same == tokens
    assert other.pages_fetched == phone.pages_fetched
    assert other.pages_used == phone.pages_used
    # The stream asks for a piece as soon as a slot is free, the walk when it takes the next one.
    assert 0.75 * walked < seconds <= walked


@needs_native
@pytest.mark.parametrize(("kind", "error"), [("read-errors", StoreError), ("damage", CorruptPage)])
def test_a_fault_in_the_middle_of_an_answer_is_met_by_a_step(
    kind: str, error: type[Exception], phone: Device, tiny: Path
) -> None:
    with phone.open(tiny, kv_budget="30%") as generator:
        generator.prefill(PROMPT, max_tokens=20)
        generator.step([5])
        step_s = -phone.now()
        generator.step([5])
        step_s += phone.now()
        phone.schedule(Event(phone.now() + step_s / 2, kind, rate=1.0))
        with pytest.raises(error, match="offload"):
            [generator.step([5]) for _ in range(3)]


def changed(profile: DeviceProfile, **values: float) -> DeviceProfile:
    """Return a profile with other numbers for its drive, and no heat."""
    flash = {name: dataclasses.replace(getattr(profile.flash, name), value=value) for name, value in values.items()}
    floor: Quantity[float] = dataclasses.replace(profile.thermal.floor_share, value=1.0)
    return dataclasses.replace(
        profile,
        flash=dataclasses.replace(profile.flash, **flash),
        thermal=dataclasses.replace(profile.thermal, floor_share=floor),
    )


@pytest.mark.parametrize("attention_s", [0.001, 0.1])
def test_the_longer_of_computing_and_reading_decides(attention_s: float, config_json: dict[str, object]) -> None:
    """Four layers of three pieces of two records, through a ring of three slots: a read takes 10 ms."""
    profile = load("android-low-4gb")
    cost = StepCost.of(profile, Geometry.from_config(config_json), "onnx", "int4", 32)
    size, layers, count = cost.pages.record_bytes, 4, 3
    flash = changed(profile, read_bytes_per_s=2 * size / 0.01, read_t0_s=0.0, iops_limit=1e9)
    clock = Clock(flash.thermal, Agenda(), lambda: None)
    medium = EmulatedMedium(flash.flash, clock, seed=0)
    fetched: list[int] = []
    walk = NativeWalk(3, medium, clock, cost, fetched.append)
    for layer in range(layers):
        pages, places = np.arange(2 * count), 100 * layer + np.arange(2 * count)
        walk.plan(layer, 2 * np.arange(1, count + 1), np.full(count, 2), pages, places)
    for step in range(2):
        began = clock.now
        for layer in range(layers):
            assert walk.pass_through(layer, [attention_s] * count, heed=True) == -1
        pieces = layers * count
        assert sum(fetched) == 2 * pieces * (step + 1)
        busy = pieces * (attention_s + cost.fetch(2))
        # The first two pieces of all are waited for; where reading decides, three of a step were read in the one before.
        least, most = max(busy, 0.01 * (pieces - 3)), max(busy, 0.01 * pieces)
        assert least <= clock.now - began <= most + (0.02 if step == 0 else 0.002)
    assert medium.drive.bytes_read == 2 * size * (2 * pieces + 3)
