"""Every option of every command with values that make no sense: one line and an exit code of the docs, whatever was typed.

Commands and options are those of the command line itself, so that a new one is tested from its first day.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .test_output import COMMANDS

Bundle = Callable[..., Path]
SILLY = [
    "", "nan", "-1", "1e-310", "\udcff\udcfe", "x" * 300, "0", "inf", "9" * 40, "a\nb", "/dev/null", "selective:nan%", " ",
    "1e999", "..", "-inf%", "\0", "0.7", "--", "😀", "/proc/self/mem/x", "[red]", "%s{}", "true",
]  # fmt: skip
#: A long name is the file name of these tests, too.
LEAVES = [(path, command) for path, command in COMMANDS if not hasattr(command, "commands")]


class Case:
    """What a command needs to get past its arguments, and no further than is cheap."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        text, checkpoint = folder / "text.txt", folder / "checkpoint"
        text.write_text("It was a dark night. " * 4, encoding="utf-8")
        checkpoint.mkdir()
        self.values: dict[str, dict[str, object]] = {
            "run": {"bundle": bundle, "--prompt": "It was", "--max-tokens": "1"},
            "inspect": {"bundle": bundle},
            # nobody listens there
            "deploy": {"bundle": bundle, "target": "nobody@127.0.0.1:9", "--ssh-option": "ConnectTimeout=1"},
            "bench": {"bundle": bundle, "--prompt-tokens": "1", "--generate": "1", "--repeat": "1"},
            "plan": {"model": bundle, "--profile": "laptop-16gb"},
            "emulate": {"model": bundle, "--profile": "laptop-16gb", "--prompt-tokens": "8", "--max-tokens": "1"},
            "export": {"source": checkpoint, "--out": folder / "out.edgekv"},
            "sweep": {"model": bundle, "--profiles": "laptop-16gb", "--contexts": "64", "--out": folder / "o.csv"},
            "verify": {"bundle": bundle, "--gate": folder / "none.toml"},
            "prefix add": {"bundle": bundle, "--file": text},
            "profiles calibrate": {"--out": "/proc/none/there.toml"},
            "profiles show": {"name": "laptop-16gb"},
            "profiles diff": {"first": "laptop-16gb", "second": "pixel-8-8gb"},
            "profiles validate": {"profiles": "laptop-16gb"},
            "sessions fork": {"session": folder / "no.kv", "target": folder / "fork.kv"},
            "offload list": {"url": f"file://{folder}"},
            "offload rm": {"url": f"file://{folder}", "runs": "nothing"},
        }

    def line(self, path: str, command: Any, parameter: Any, value: str) -> list[str]:
        """Return the arguments of a command with one of its parameters set to a silly value."""
        known = self.values.get(path, {})
        words: list[str] = path.split()
        for other in command.params:
            name = next((name for name in other.opts if name.startswith("--")), other.opts[0])
            if other is parameter:
                flag = getattr(other, "is_flag", False)
                words += (
                    [name]
                    if flag
                    else [name, value]
                    if name.startswith("-")
                    else ["--", value]
                    if value[:1] == "-"
                    else [value]
                )
            elif name in known:
                words += [name, str(known[name])] if name.startswith("-") else [str(known[name])]
            elif other.required:
                words += [name, "none"] if name.startswith("-") else ["none"]
        return words


def cases(bundle: Path, folder: Path, values: Callable[[int], list[str]]) -> Iterator[list[str]]:
    made, count = Case(bundle, folder), 0
    for path, command in LEAVES:
        for parameter in command.params:
            if parameter.name in (
                "help",
                "install_completion",
                "show_completion",
                "jail",
            ):  # jail begins another process
                continue
            flag = getattr(parameter, "is_flag", False)
            for value in [""] if flag else values(count):
                yield made.line(path.removeprefix("edgekv "), command, parameter, value)
            count += 1


def outcomes(lines: list[list[str]], folder: Path) -> list[dict[str, Any]]:
    answered = folder / "answers.jsonl"
    result = subprocess.run(
        [sys.executable, "-m", "tests.cli.many", str(answered)],
        input="".join(json.dumps(line) + "\n" for line in lines), capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}, cwd=folder,
    )  # fmt: skip
    answers = [json.loads(line) for line in answered.read_text(encoding="utf-8").splitlines()]
    assert len(answers) == len(lines), (
        f"{lines[len(answers)]} ended the process: {result.returncode}\n{result.stderr[-2000:]}"
    )
    return answers


def faults(lines: list[list[str]], folder: Path) -> list[str]:
    found = []
    for line, answer in zip(lines, outcomes(lines, folder), strict=True):
        said = [text for text in answer["stderr"].splitlines() if text.startswith("edgekv: ")]
        refused = answer["code"] in (1, 2) and len(said) == 1 and "Traceback" not in answer["stderr"]
        if not (refused or (answer["code"] == 0 and "Traceback" not in answer["stderr"])):
            found.append(f"{line}: {answer['code']}, {answer['stderr'][-600:]!r}")
    return found


def test_a_silly_value_of_any_option_is_one_line_and_an_exit_code_of_the_docs(bundle: Bundle, tmp_path: Path) -> None:
    lines = list(cases(bundle("demo"), tmp_path, lambda count: [SILLY[(count + at) % len(SILLY)] for at in (0, 7)]))
    assert faults(lines, tmp_path) == []


@pytest.mark.exhaustive
def test_every_silly_value_of_any_option_is_one_line_and_an_exit_code_of_the_docs(
    bundle: Bundle, tmp_path: Path
) -> None:
    assert faults(list(cases(bundle("demo"), tmp_path, lambda count: SILLY)), tmp_path) == []
