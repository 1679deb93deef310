"""What engines and libraries log stays off the terminal, unless it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cases import seldom

Bundle = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **variables}
    )


@pytest.mark.parametrize(("options", "variables"), [((), {"EDGEKV_LOG": "info"}), (("--verbose",), {})])
@pytest.mark.parametrize("form", seldom(["split", "inline"], but=["split"]))
def test_an_engine_is_heard_only_when_asked(
    bundle: Bundle, form: str, options: tuple[str, ...], variables: dict[str, str]
) -> None:
    command = ("run", bundle("demo", form=form), "--prompt", "It was", "-n", "2", "-q")
    silent = run(sys.executable, "-m", "edgekv", *command)
    assert silent.returncode == 0
    assert silent.stderr == ""
    heard = run(sys.executable, "-m", "edgekv", *options, *command, **variables)
    assert heard.stdout == silent.stdout
    assert "onnxruntime" in heard.stderr


LIBRARY = """
import logging, sys, warnings
from edgekv.cli.main import run_command_line
assert run_command_line([*sys.argv[1:], "profiles", "list", "--json"]) == 0
logging.getLogger("torchao").warning("cpp extensions were skipped")
warnings.warn("a library warns")
logging.getLogger("edgekv.runtime.storage").warning("edgekv: the objects are left")
"""


def test_what_a_library_warns_of_is_heard_only_when_asked_and_edgekv_itself_always() -> None:
    assert run(sys.executable, "-c", LIBRARY).stderr == "edgekv: the objects are left\n"
    heard = run(sys.executable, "-c", LIBRARY, "--verbose").stderr
    for words in ("cpp extensions", "a library warns", "the objects are left"):
        assert words in heard


def test_a_level_that_is_none_is_one_line() -> None:
    result = run(sys.executable, "-m", "edgekv", "profiles", "list", EDGEKV_LOG="loud")
    assert result.returncode == 2
    assert result.stderr.startswith("edgekv: EDGEKV_LOG must be")
    assert result.stderr.count("\n") == 1


def test_onnxruntime_loads_in_silence_where_it_may_not_look_for_devices() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (apt-get install strace)")
    buses = "/sys/bus/pci/devices"
    if not Path(buses).exists():
        pytest.skip(f"there is no {buses} here")
    refuse = [
        "strace",
        "-f",
        "-qq",
        "-e",
        "trace=openat",
        "-e",
        "inject=openat:error=EACCES",
        "-P",
        buses,
        "-o",
        os.devnull,
    ]
    told = run(*refuse, sys.executable, "-c", "import edgekv, onnxruntime").stderr
    if "device" not in told:
        pytest.skip("this ONNX Runtime does not look there, or strace may not trace here")
    assert run(*refuse, sys.executable, "-c", "import edgekv.runtime.engines.onnx.segments").stderr == ""
