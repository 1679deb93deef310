"""What a process of the command line does at its edges: streams that are full, closed or not UTF-8, and faults."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekv.cli.process import EXIT_CODES, exit_code
from edgekv.errors import EdgeKVError, StoreFull, UsageError

Bundle = Callable[..., Path]
DOCS = Path(__file__).resolve().parents[2] / "docs"


def shell(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command of bash in which ``edgekv`` is the real process."""
    return subprocess.run(
        ["bash", "-c", f'edgekv() {{ "{sys.executable}" -m edgekv "$@"; }}; {command}'],
        capture_output=True, text=True, check=False, errors="surrogateescape", env={**os.environ, **variables},
    )  # fmt: skip


def test_the_docs_name_every_exit_code_and_no_other() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (DOCS / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    plain = {int(code): re.sub(r"<code>(.*?)</code>", r"`\1`", text).replace("&#124;", "|") for code, text in rows}
    assert plain == EXIT_CODES


@pytest.mark.parametrize("command", ["--version >/dev/full", "profiles list >/dev/full", "profiles list --json >&-"])
def test_a_stdout_that_takes_nothing_is_one_line_and_exit_code_1(command: str) -> None:
    result = shell(f"edgekv {command}")
    assert result.returncode == 1
    assert result.stderr.startswith("edgekv: cannot write the output: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["--help", "profiles list --json"])
def test_a_reader_that_goes_away_is_exit_code_141_without_a_word(command: str) -> None:
    result = shell(f"edgekv {command} | true; exit ${{PIPESTATUS[0]}}")
    assert result.returncode == 141
    assert result.stderr == ""


def test_a_closed_stderr_does_not_swallow_the_output_into_another_file(bundle: Bundle) -> None:
    result = shell(f"edgekv run '{bundle('demo')}' -p 'It was' -n 4 2>&-")
    assert result.returncode == 0
    assert result.stdout.strip()


def test_a_stream_that_is_not_utf8_gets_the_codes_of_what_it_cannot_print(bundle: Bundle) -> None:
    result = shell(f"edgekv run '{bundle('demo')}' -p 'café “was”' -n 2 --quiet", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "\\u201d" in result.stdout


def test_a_prompt_is_utf8_in_a_locale_that_has_no_such_characters(bundle: Bundle) -> None:
    command = f"edgekv run '{bundle('demo')}' -p 'café “was”' -n 4 --quiet"
    plain = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    result = shell(command, **plain)
    assert result.returncode == 0, result.stderr
    assert result.stdout == shell(command).stdout


@pytest.mark.parametrize(
    "argument", ["-p $'a \\xff'", "-f - < <(printf 'It \\xff was')", "--chat < <(printf 'It \\xff was')"]
)
def test_text_that_is_not_utf8_is_refused_with_its_place(argument: str, bundle: Bundle) -> None:
    result = shell(f"edgekv run '{bundle('demo')}' -n 4 --quiet {argument}")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "UTF-8" in result.stderr


@pytest.mark.parametrize("home", ["HOME=/proc/none", "-u HOME"])
def test_a_home_that_cannot_be_used_only_costs_time(home: str, bundle: Bundle, tmp_path: Path) -> None:
    command = (
        f"cd {tmp_path}; env -u XDG_CACHE_HOME -u XDG_CONFIG_HOME {home} TMPDIR={tmp_path} PYTHONPATH={DOCS.parent}"
    )
    result = shell(f"{command} {sys.executable} -m edgekv run '{bundle('demo')}' -p 'It was' -n 4 --quiet")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert result.stderr == ""


def test_pages_that_have_no_folder_to_go_to_are_one_line(bundle: Bundle) -> None:
    command = f"edgekv run '{bundle('demo')}' -f {DOCS.parent}/examples/long_prompt.txt -n 4 --kv-budget 25%"
    result = shell(command, HOME="/proc/none", XDG_CACHE_HOME="/proc/none")
    assert result.returncode == 1
    assert result.stdout == ""
    assert "cannot write the offload folder /proc/none/edgekv/offload" in result.stderr
    assert "--offload DIR" in result.stderr


def _raise(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EdgeKVError("it failed"), 1),
        (StoreFull("no room"), 1),
        (UsageError("not so"), 2),
        (KeyboardInterrupt(), 130),
        (SystemExit(143), 143),
        (MemoryError(), 1),
        (PermissionError(13, "Permission denied", "/etc/shadow"), 1),
        (ValueError("n_threads must be 1..256\nand more"), 70),
        (RecursionError(), 70),
        (OSError("no number"), 70),
    ],
)
def test_whatever_a_command_raises_is_one_line_and_a_code_of_the_docs(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(_raise(error)) == code
    assert code in EXIT_CODES
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (0 if isinstance(error, SystemExit) else 1)
    assert all(line.startswith("edgekv: ") for line in lines)


def test_a_fault_names_the_file_that_holds_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(_raise(KeyError("lost"))) == 70
    line = capsys.readouterr().err
    found = re.search(r"the traceback is in (\S+\.txt)", line)
    assert found is not None, line
    path = Path(found[1])
    text = path.read_text(encoding="utf-8")
    path.unlink()
    assert "KeyError: 'lost'" in text
    assert "in command" in text
