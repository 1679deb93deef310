"""What Tab completes in a shell: the process that the shell asks, as it asks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from edgekv.contract import ENGINES, WEIGHTS
from edgekv.device_profiles import names
from edgekv.settings import POLICY


def completed(line: str) -> list[str]:
    """Return what bash is offered for the last word of a line."""
    words = line.split(" ")
    asked = {"_EDGEKV_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    result = subprocess.run(
        [sys.executable, "-m", "edgekv"], capture_output=True, text=True, check=True, env={**os.environ, **asked}
    )
    assert result.stderr == ""
    return result.stdout.split()


RASPBERRIES = [name for name in names() if name.startswith("rasp")]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("edgekv run x.edgekv --profile rasp", RASPBERRIES),
        ("edgekv plan config.json --profile rasp", RASPBERRIES),
        ("edgekv profiles show rasp", RASPBERRIES),
        ("edgekv profiles diff android-low-4gb rasp", RASPBERRIES),
        ("edgekv sweep c.json --profiles android-low-4gb,rasp", [f"android-low-4gb,{name}" for name in RASPBERRIES]),
        ("edgekv sweep c.json --profiles al", ["all"]),
        ("edgekv run x.edgekv --policy ", list(POLICY.words)),
        ("edgekv sweep c.json --policies lru,h", ["lru,heavy"]),
        ("edgekv export demo --engine ", list(ENGINES)),
        ("edgekv emulate c.json --engine ex", ["executorch"]),
        ("edgekv plan c.json --weights ", list(WEIGHTS)),
        ("edgekv run x.edgekv --kv f", ["fp16"]),
        ("edgekv bench x.edgekv --kv f", ["fp16"]),
        ("edgekv export demo --target rasp", RASPBERRIES),
    ],
)
def test_tab_completes_the_names_of_devices_policies_and_engines(line: str, offered: list[str]) -> None:
    assert completed(line) == offered
