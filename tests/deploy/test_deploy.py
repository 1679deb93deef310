"""A bundle onto a device that has nothing of ours: what is refused before, what stands there after, and the tokens it gives."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekv.bundle import read_manifest, write_manifest
from edgekv.cli.main import run_command_line
from edgekv.deploy.deploy import Runtime, compare_tokens
from edgekv.deploy.device import Device
from edgekv.deploy.facts import ask_device
from edgekv.deploy.refuse import LEAST_PYTHON, check_flash, check_made_for, check_memory, check_runtime
from edgekv.deploy.service import unit_name, unit_text
from edgekv.deploy.wheels import EXECUTORCH, platforms
from edgekv.errors import BudgetError, EdgeKVError, TokensDiffer, UsageError

from .conftest import Board

Bundle = Callable[..., Path]
Shim = Callable[[str, str], None]
Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[2]
#: A systemctl that writes down what it is told.
SYSTEMCTL = 'echo "$*" >> "$HOME/systemctl.log"'


@pytest.fixture
def surroundings(board: Board, own: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings of this machine's user and pip; returns the arguments behind the bundle."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return [*board.arguments, "--wheel", str(own), "--to", f"kv {tmp_path.name}"]


def deployed(bundle: Path, arguments: list[str], capsys: Capture) -> dict[str, Any]:
    code = run_command_line(["deploy", str(bundle), *arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)  # type: ignore[no-any-return]


def refused(code: int, bundle: Path, arguments: list[str], capsys: Capture) -> str:
    assert run_command_line(["deploy", str(bundle), *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("edgekv: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.slow
def test_a_device_with_nothing_of_ours_gives_the_same_tokens_and_gets_only_what_changed(
    bundle: Bundle, surroundings: list[str], board: Board, shim: Shim, tmp_path: Path, capsys: Capture, device: Device
) -> None:
    assert "No module named 'numpy'" in device.run("python3 -c 'import numpy'").stderr
    shim("systemctl", SYSTEMCTL)
    demo = tmp_path / "demo.edgekv"
    shutil.copytree(bundle("demo"), demo)
    quick = [*surroundings, "--calibrate", "none"]
    found = deployed(demo, quick, capsys)
    size = sum(path.stat().st_size for path in demo.iterdir())
    assert found["bundle_bytes_to_copy"] == size
    assert len(found["tokens"]) > 20
    where = Path(found["bundle"])
    assert where.parent.parent == board.home
    assert sorted(path.name for path in where.iterdir()) == sorted(path.name for path in demo.iterdir())
    assert [path.name for path in where.parent.rglob("*") if path.name.endswith((".part", ".older", ".whl"))] == []
    launcher = where.parent / "edgekv"
    said = device.run(f"'{launcher}' run '{where}' --prompt It -n 3 --json")
    assert json.loads(said.stdout)["finish_reason"] == "length", said.stderr

    # one file of the bundle is another one, and one of its files on the device is damaged
    (demo / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    write_manifest(demo, read_manifest(demo))
    (where / "tokenizer.json").write_bytes(b"{}")
    changed = ("chat_template.jinja", "manifest.json", "tokenizer.json")
    again = deployed(demo, [*quick, "--check", "none", "--service"], capsys)
    assert again["bundle_bytes_to_copy"] == sum((demo / name).stat().st_size for name in changed)
    assert again["tokens"] is None
    assert (board.home / ".config/systemd/user/edgekv-demo.service").read_text().count(f'ExecStart="{launcher}"') == 1
    assert (board.home / "systemctl.log").read_text().split("\n")[-3:] == [
        "--user enable edgekv-demo.service", "--user restart edgekv-demo.service", "",
    ]  # fmt: skip


@pytest.fixture
def runtime(device: Device) -> Runtime:
    """This machine's own packages in the place of unpacked wheels, which takes half a minute less."""
    packages = {str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))}
    return Runtime(device, sorted(packages))


def test_the_tokens_of_a_device_are_those_of_this_machine(runtime: Runtime, bundle: Bundle) -> None:
    assert len(compare_tokens(runtime, bundle("demo"), str(bundle("demo")))) > 20


def test_a_device_that_gives_other_tokens_is_an_error_with_a_code_of_its_own(
    runtime: Runtime, bundle: Bundle, shim: Shim
) -> None:
    shim("python3", 'echo "[366, 222]"')
    with pytest.raises(TokensDiffer, match="gives other tokens: token 2 is None there and 351 here") as caught:
        compare_tokens(runtime, bundle("demo"), "there.edgekv")
    assert caught.value.exit_code == 3


def test_a_bundle_that_does_not_run_on_a_device_is_its_last_line(runtime: Runtime, bundle: Bundle) -> None:
    with pytest.raises(EdgeKVError, match=r"edgekv fails there: .*there is no there\.edgekv"):
        compare_tokens(runtime, bundle("demo"), "there.edgekv")


@pytest.mark.parametrize(
    ("command", "script", "words"),
    [
        ("uname", '[ "$1" = -m ] && echo riscv64 || exec /bin/uname "$@"', "is riscv64; there are wheels for x86_64 and"),
        ("uname", '[ "$1" = -s ] && echo Darwin || exec /bin/uname "$@"', "runs Darwin; there are wheels for"),
        ("python3", 'echo "[[3, 8], \\"cpython\\", 64, \\"glibc 2.36\\", \\"\\"]"', "has cpython 3.8; edgekv needs CPython 3.10"),
        ("python3", 'echo "[[3, 11], \\"cpython\\", 32, \\"glibc 2.36\\", \\"\\"]"', "has a Python of 32 bits"),
        ("python3", 'echo "[[3, 11], \\"cpython\\", 64, null, \\"\\"]"', "has the C library unknown"),
        ("python3", "exit 127", "has no python3; install Python 3.10 or newer there"),
        ("df", 'echo "Filesystem 1024-blocks Used Available Capacity"; echo "/dev/sd 99 9 40000 9% /"', "39.1 MiB free at"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_copied(
    command: str, script: str, words: str, bundle: Bundle, board: Board, shim: Shim, tmp_path: Path, capsys: Capture
) -> None:
    shim(command, script)
    line = refused(2, bundle("demo"), [*board.arguments, "--to", tmp_path.name, "--dry-run"], capsys)
    assert words in line
    assert not (board.home / tmp_path.name).exists()


def test_a_dry_run_tells_of_the_device_and_changes_nothing(
    bundle: Bundle, board: Board, tmp_path: Path, capsys: Capture
) -> None:
    found = deployed(bundle("demo"), [*board.arguments, "--to", f"{tmp_path.name}/deep/er", "--dry-run"], capsys)
    assert found["device"]["folder"] == str(board.home / tmp_path.name / "deep/er")
    assert found["device"]["ram_bytes"] > found["kv_bytes_left"] > 0
    assert not (board.home / tmp_path.name).exists()


def test_a_bundle_that_a_device_has_no_memory_or_was_not_made_for_is_refused(device: Device, bundle: Bundle) -> None:
    facts, manifest = ask_device(device, "x"), read_manifest(bundle("demo"))
    with pytest.raises(BudgetError, match=r"of 1\.0 GiB are 100\.0 MiB available"):
        check_memory("pi", dataclasses.replace(facts, ram_bytes=1 << 30, available_bytes=100 << 20), manifest)
    pi = dataclasses.replace(facts, machine="aarch64", machine_class="arm64, dotprod")
    int4 = dataclasses.replace(manifest, weights="int4", made_for="x86-64, AVX2")
    with pytest.raises(UsageError, match=r"made for x86-64, AVX2 .* and pi is arm64, dotprod: export it with --target"):
        check_made_for("pi", pi, int4)
    older = check_made_for("pi", pi, dataclasses.replace(int4, made_for="arm64"))
    assert older is not None
    assert "may be slow" in older
    assert check_made_for("pi", pi, dataclasses.replace(int4, weights="fp32")) is None
    with pytest.raises(UsageError, match=r"has glibc 2\.17; the wheels need 2\.27"):
        check_runtime("pi", dataclasses.replace(facts, glibc=(2, 17), libc="glibc 2.17"), manifest)
    with pytest.raises(UsageError, match=r"has no C\+\+ compiler"):
        check_runtime(
            "pi", dataclasses.replace(facts, compiler=False), dataclasses.replace(manifest, engine="executorch")
        )
    with pytest.raises(UsageError, match=r"free at .* are needed"):
        check_flash("pi", facts, facts.free_flash_bytes)


def test_a_service_is_refused_where_there_is_no_systemd(
    bundle: Bundle, board: Board, shim: Shim, tmp_path: Path, capsys: Capture
) -> None:
    shim("systemctl", "exit 1")
    arguments = [*board.arguments, "--to", tmp_path.name]
    assert "no systemd for services of the user" in refused(2, bundle("demo"), [*arguments, "--service"], capsys)
    assert "--serve-options is for --service" in refused(
        2, bundle("demo"), [*arguments, "--serve-options", "-q"], capsys
    )
    assert not (board.home / tmp_path.name).exists()


def test_without_a_wheel_for_the_device_the_error_says_how_to_make_one(
    bundle: Bundle, surroundings: list[str], board: Board, tmp_path: Path, capsys: Capture
) -> None:
    other = tmp_path / "dist"
    other.mkdir()
    (other / "edgekv-0.1.0-cp39-cp39-win_amd64.whl").touch()
    line = refused(2, bundle("demo"), [*surroundings, "--wheel", str(other)], capsys)
    assert re.search(r"has no wheel of edgekv \S+ for \S+, Python \S+ and glibc \S+; make one with: make wheels", line)
    assert "there is no /no/where" in refused(2, bundle("demo"), [*surroundings, "--wheel", "/no/where"], capsys)
    assert not (board.home / f"kv {tmp_path.name}").exists()


def test_the_unit_of_a_service_quotes_what_systemd_would_read() -> None:
    text = unit_text(
        "50% off.edgekv", ["/home/pi/edge kv/edgekv", "serve", "/x/50% off.edgekv", "--api-key-file", 'a"$b']
    )
    assert 'ExecStart="/home/pi/edge kv/edgekv" serve "/x/50%% off.edgekv" --api-key-file "a\\"$$b"\n' in text
    assert unit_name("50% off.edgekv") == "edgekv-50__off.service"


def test_tags_of_wheels_go_down_from_the_glibc_of_the_device(device: Device) -> None:
    facts = dataclasses.replace(ask_device(device, "x"), machine="aarch64", glibc=(2, 31))
    tags = platforms(facts)
    assert tags[0] == "manylinux_2_31_aarch64"
    assert "manylinux_2_17_aarch64" in tags
    assert "manylinux_2_34_aarch64" not in tags


def test_the_least_python_is_that_of_the_project() -> None:
    least = ".".join(map(str, LEAST_PYTHON))
    assert f'requires-python = ">={least}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_engine_of_a_device_is_the_one_of_the_project() -> None:
    assert f'executorch = ["{EXECUTORCH}"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_device_is_measured_and_its_profile_comes_back_once(
    bundle: Bundle, surroundings: list[str], board: Board, tmp_path: Path, capsys: Capture
) -> None:
    found = deployed(bundle("demo"), surroundings, capsys)
    profile = Path(found["profile"])
    assert profile.parent == tmp_path / "config" / "edgekv" / "profiles"
    there = board.home / f"kv {tmp_path.name}" / profile.name
    assert there.read_text() == profile.read_text()
    assert str(there) in found["command"]
    assert subprocess.run(
        [*["env", "-i", "sh", "-c"], f"ls '{there.parent}'/.calibrate"], check=False, capture_output=True
    ).returncode
    text = profile.read_text()
    deployed(bundle("demo"), surroundings, capsys)
    assert profile.read_text() == text
