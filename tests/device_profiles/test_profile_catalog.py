"""Finding profiles: names, the user's folder, shadowing, extends, differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgekv.device_profiles import diff, load, load_many, names, user_dir
from edgekv.errors import ProfileError

LIMIT = """name = "{name}"
title = "Mine"
extends = "{base}"
[memory]
app_limit_bytes = {{ value = "{limit}", source = "a test", confidence = "high" }}
"""


def write(folder: Path, name: str, base: str, limit: str = "2GB") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(LIMIT.format(name=name, base=base, limit=limit), encoding="utf-8")
    return path


def test_the_user_folder_follows_xdg_and_ignores_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert user_dir() == tmp_path / "config" / "edgekv" / "profiles"
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CONFIG_HOME", ignored)
        assert user_dir() == tmp_path / ".config" / "edgekv" / "profiles"


def test_a_missing_user_folder_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nothing"))
    assert "pixel-8-8gb" in names()


def test_a_user_profile_is_listed_and_loaded_by_name(user_profiles: Path) -> None:
    write(user_profiles, "my-phone", base="pixel-8-8gb")
    assert "my-phone" in names()
    mine = load("my-phone")
    assert mine.memory.app_limit_bytes.value == 2_000_000_000
    assert mine.kind == "phone"
    assert mine.title == "Mine"


def test_a_user_profile_shadows_the_bundled_one_and_may_extend_it(user_profiles: Path) -> None:
    bundled = load("pixel-8-8gb")
    path = write(user_profiles, "pixel-8-8gb", base="pixel-8-8gb")
    mine = load("pixel-8-8gb")
    assert mine.path == path
    assert mine.memory.app_limit_bytes.value == 2_000_000_000
    assert mine.flash == bundled.flash
    assert names().count("pixel-8-8gb") == 1


def test_a_path_is_loaded_whatever_the_folder(tmp_path: Path) -> None:
    path = write(tmp_path, "elsewhere", base="laptop-16gb")
    assert load(path) == load(str(path))


def test_a_replaced_number_keeps_its_own_source_only(tmp_path: Path) -> None:
    entry = load(write(tmp_path, "mine", base="laptop-16gb")).memory.app_limit_bytes
    assert (entry.source, entry.confidence) == ("a test", "high")


def test_an_override_must_be_complete(tmp_path: Path) -> None:
    path = write(tmp_path, "mine", base="laptop-16gb")
    path.write_text(path.read_text(encoding="utf-8").replace('value = "2GB", ', ""), encoding="utf-8")
    with pytest.raises(ProfileError, match=r"mine\.toml: memory\.app_limit_bytes\.value is missing"):
        load(path)


def test_a_fault_of_the_base_names_the_file_of_the_base(user_profiles: Path, tmp_path: Path) -> None:
    base = write(user_profiles, "base", base="laptop-16gb", limit="99GB")
    with pytest.raises(ProfileError) as caught:
        load(write(tmp_path, "mine", base="base"))
    assert str(caught.value).startswith(f"{base}: memory.app_limit_bytes")


def test_a_name_that_is_no_file_is_named_and_the_others_are_listed(user_profiles: Path) -> None:
    (user_profiles / "gone.toml").symlink_to(user_profiles / "nowhere")
    (user_profiles / "folder.toml").mkdir()
    good, problems = load_many(names())
    assert [str(problem) for problem in problems] == [
        f"{user_profiles / name}.toml is no file that can be read as a profile; remove it"
        for name in ("folder", "gone")
    ]
    assert len(good) == len(names()) - 2


def test_profiles_that_extend_each_other_are_refused(user_profiles: Path) -> None:
    write(user_profiles, "one", base="two")
    write(user_profiles, "two", base="one")
    with pytest.raises(ProfileError, match=r"two\.toml: extends = 'one' leads back to itself"):
        load("one")


def test_an_unknown_name_suggests_a_near_one_and_where_to_add_it() -> None:
    with pytest.raises(ProfileError, match=r'no profile is named .*did you mean "raspberry-pi-5-8gb"') as caught:
        load("rasberry-pi-5-8gb")
    with pytest.raises(ProfileError, match="no profile is named 'zx81'; `edgekv profiles list` shows all"):
        load("zx81")
    assert "edgekv profiles list" in str(caught.value)
    assert str(user_dir()) in str(caught.value)


def test_an_unknown_base_names_the_file_that_asks_for_it(tmp_path: Path) -> None:
    path = write(tmp_path, "mine", base="pixel-8")
    with pytest.raises(ProfileError, match=r"extends names the unknown profile 'pixel-8'; did you mean") as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    path.write_text('name = "mine"\nextends = 5\n', encoding="utf-8")
    with pytest.raises(ProfileError, match="extends is 5, not a text"):
        load(path)


def test_a_missing_file_and_a_folder_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"cannot be read .No such file"):
        load(tmp_path / "none.toml")
    with pytest.raises(ProfileError, match=r"cannot be read .Is a directory"):
        load(tmp_path)


def test_one_bad_file_does_not_hide_the_good_ones(write_profile: Callable[..., Path]) -> None:
    profiles, problems = load_many([write_profile(("[flash]", "[flesh]")), "pixel-8-8gb"])
    assert [profile.name for profile in profiles] == ["pixel-8-8gb"]
    assert len(problems) == 1


def test_a_difference_is_a_value_and_not_a_source() -> None:
    rows = {row.field: row for row in diff(load("jetson-orin-nano-8gb"), load("jetson-orin-nano-super-8gb"))}
    bandwidth = rows["compute.onnx-cuda.weight_read_bytes_per_s"]
    assert (bandwidth.first, bandwidth.second) == ("58 GB/s", "85 GB/s")
    assert "memory.ram_bytes" not in rows
    only = {row.field: row for row in diff(load("pixel-8-8gb"), load("jetson-orin-nano-8gb"))}
    assert only["compute.onnx-cuda.threads"].first is None
    assert diff(load("pixel-8-8gb"), load("pixel-8-8gb")) == []
