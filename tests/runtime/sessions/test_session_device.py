"""A session on an emulated device: killed at any moment of virtual time, it loses no token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgekv.emulator import Device, Event
from edgekv.emulator.play.play import emulate
from edgekv.emulator.play.scenario import AppSettings, Scenario, Turn

TURNS = (
    Turn(prompt="Once upon a time there was a page table " * 8, max_tokens=40),
    Turn(prompt="And then?", max_tokens=20),
)
APP = AppSettings(session=True, checkpoint_tokens=8, prefill_chunk=64, kv_budget="60%", restart_s=0.1)


@pytest.fixture(scope="module")
def tiny(bundle: Callable[..., Path], checkpoint: Callable[[str], Path]) -> Path:
    return bundle(checkpoint("llama"))


def test_whenever_the_app_is_killed_its_session_goes_on_to_the_same_text(tiny: Path) -> None:
    undisturbed = emulate(tiny, Device("android-low-4gb"), Scenario(TURNS, app=APP))
    said = [turn.text for turn in undisturbed.turns]
    for share in range(5, 100, 10):
        event = Event(undisturbed.totals["seconds"] * share / 100, "kill")
        killed = emulate(tiny, Device("android-low-4gb"), Scenario(TURNS, app=APP, events=(event,)))
        assert killed.totals["kills"] == 1
        assert [turn.text for turn in killed.turns] == said, f"killed at {share} %"
