"""Real limits around real processes: control groups where there are any, rlimits everywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgekv.errors import UsageError
from edgekv.jail import KINDS, delegated, run_limited

MIB = 1024**2
TAKE = "import sys; block = bytearray(int(sys.argv[1])); block[::4096] = b'x' * len(block[::4096]); print(len(block))"


@pytest.mark.parametrize("kind", KINDS)
def test_a_jail_ends_a_process_that_takes_too_much_and_no_other(kind: str) -> None:
    def taken(size: int) -> int:
        return run_limited([sys.executable, "-c", TAKE, str(size)], 200 * MIB, kinds=(kind,)).returncode

    try:
        fits = taken(20 * MIB)
    except UsageError:
        assert kind != "rlimit"
        pytest.skip(f"this user may make no {kind} with a memory limit")
    assert fits == 0
    assert taken(400 * MIB) != 0


def test_a_system_without_any_limit_says_so() -> None:
    with pytest.raises(UsageError, match="run without --jail"):
        run_limited([sys.executable, "-c", ""], MIB, kinds=())


def test_a_jailed_emulation_that_fits_says_how_much_it_took(tiny: Path) -> None:
    command = ["emulate", str(tiny), "--profile", "android-low-4gb", "--prompt-tokens", "64", "-n", "4", "--jail"]
    done = subprocess.run(
        [sys.executable, "-m", "edgekv", *command, "--json"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("{")
    assert "jail: " in done.stderr


def test_a_command_that_gets_no_more_memory_ends_in_a_line_and_no_traceback() -> None:
    script = "import sys; from edgekv.cli.process import exit_code; sys.exit(exit_code(lambda: bytearray(1 << 62)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "edgekv: the system gives this process no more memory; lower --kv-budget or --context\n"


def test_a_group_is_made_where_the_system_gave_this_user_the_memory_controller(tmp_path: Path) -> None:
    # As under systemd: the user's service was given controllers, the scope of the shell holds processes and gives none on.
    scope = tmp_path / "user.slice" / "user@1000.service" / "app.slice" / "shell.scope"
    scope.mkdir(parents=True)
    for group in (scope, *scope.parents):
        given = "" if group == scope else "cpu memory pids"
        (group / "cgroup.subtree_control").write_text(given, encoding="ascii")
        (group / "cgroup.procs").write_text("", encoding="ascii")
        if group == tmp_path:
            break
    assert delegated(tmp_path, "/user.slice/user@1000.service/app.slice/shell.scope") == scope.parent
    for group in (scope.parent, *scope.parent.parents):
        (group / "cgroup.subtree_control").write_text("cpu pids", encoding="ascii")
        if group == tmp_path:
            break
    with pytest.raises(OSError, match="memory controller"):
        delegated(tmp_path, "/user.slice/user@1000.service/app.slice/shell.scope")
