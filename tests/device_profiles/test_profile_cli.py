"""``edgekv profiles`` as a user types it, and the page that documents the schema."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from edgekv.cli.profiles import app
from edgekv.device_profiles import docs, names
from edgekv.errors import ProfileError

ROOT = Path(__file__).parents[2]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "400", "NO_COLOR": "1"})


@pytest.mark.parametrize("arguments", [(), ("list",)])
def test_without_a_command_the_profiles_are_listed(arguments: tuple[str, ...]) -> None:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert all(name in result.stdout for name in names())
    assert "6.5 GiB" in result.stdout


@pytest.mark.parametrize("arguments", [("--json",), ("list", "--json")])
def test_the_list_is_json_on_request(arguments: tuple[str, ...]) -> None:
    data = json.loads(call(*arguments).stdout)
    assert [profile["name"] for profile in data] == names()


def test_names_are_not_cut_in_a_narrow_terminal() -> None:
    result = CliRunner().invoke(app, ["list"], env={"COLUMNS": "60", "NO_COLOR": "1"})
    assert all(name in result.stdout for name in names())


def test_the_list_tells_the_users_profiles_and_reports_a_broken_one(
    user_profiles: Path, write_profile: Callable[..., Path]
) -> None:
    write_profile(name="mine", folder=user_profiles)
    result = call("list")
    assert ["mine", "you"] in [[*line.split()[:1], *line.split()[-1:]] for line in result.stdout.splitlines()]
    write_profile(("[flash]", "[flesh]"), name="wrong", folder=user_profiles)
    result = call("list")
    assert "pixel-8-8gb" in result.stdout
    assert isinstance(result.exception, ProfileError)
    assert "wrong.toml: flesh" in str(result.exception)


def test_show_prints_every_number_with_source_and_confidence() -> None:
    result = call("show", "raspberry-pi-5-8gb")
    assert result.exit_code == 0, result.output
    row = next(line for line in result.stdout.splitlines() if " read_t0_s " in line)
    assert "0.38 ms" in row
    assert "medium" in row
    assert "sbc-reviews#60" in row


def test_show_prints_json_without_a_path() -> None:
    data = json.loads(call("show", "raspberry-pi-5-8gb", "--json").stdout)
    assert data["memory"]["app_limit_bytes"]["value"] == 7_000_000_000
    assert data["memory"]["app_limit_bytes"]["confidence"] == "medium"
    assert data["compute"]["executorch"]["by_weights"]["int8"]["gemm_ops_per_s"]["unit"] == "ops/s"
    assert "path" not in data


def test_show_refuses_an_unknown_name() -> None:
    assert isinstance(call("show", "pixel-88gb").exception, ProfileError)


def test_diff_prints_only_what_differs() -> None:
    result = call("diff", "raspberry-pi-5-8gb", "raspberry-pi-5-4gb")
    assert "memory.ram_bytes" in result.stdout
    assert "flash" not in result.stdout
    assert "the same values" in call("diff", "pixel-8-8gb", "pixel-8-8gb").stdout
    rows = json.loads(call("diff", "raspberry-pi-5-8gb", "raspberry-pi-5-4gb", "--json").stdout)
    assert rows[1]["field"] == "memory.ram_bytes"


def test_validate_takes_names_and_files_alike() -> None:
    result = call("validate", "android-low-4gb")
    assert result.exit_code == 0
    assert result.stdout.endswith("android-low-4gb.toml: ok\n")
    result = call("validate", "android-low-5gb", "--json")
    assert json.loads(result.stdout)[0]["problem"].startswith("no profile is named 'android-low-5gb'")


def test_validate_says_ok_or_what_is_wrong_in_one_line_per_file(write_profile: Callable[..., Path]) -> None:
    good = write_profile(name="good")
    result = call("validate", str(good))
    assert result.exit_code == 0
    assert result.stdout == f"{good}: ok\n"
    bad, worse = write_profile(("[flash]", "[flesh]"), name="bad"), write_profile(("0.05", "5"), name="worse")
    result = call("validate", str(bad), str(good), str(worse))
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == [str(bad), str(good), str(worse)]
    assert isinstance(result.exception, ProfileError)
    assert result.exception.exit_code == 2
    assert str(result.exception) == "2 of 3 profiles cannot be used"


@pytest.mark.parametrize("command", [(), ("list",), ("show",), ("diff",), ("validate",)])
def test_every_help_text_has_an_example(command: tuple[str, ...]) -> None:
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert "Examples:  edgekv profiles" in result.stdout


def test_the_documentation_lists_the_fields_of_the_schema() -> None:
    text = (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8")
    assert docs.update(text) == text, "run: python -m edgekv.device_profiles.docs docs/profiles.md"
    with pytest.raises(ValueError, match="lacks the markers"):
        docs.update("no table here")


def test_the_folder_is_not_importable_under_another_name() -> None:
    code = "import device_profiles"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "import this package as edgekv.device_profiles" in result.stderr
