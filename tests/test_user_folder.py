"""Where the user's folders are, whatever the environment says."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from edgekv.host import user_folder


def test_an_absolute_path_of_the_environment_is_taken_and_a_relative_one_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert user_folder("XDG_CACHE_HOME", ".cache") == tmp_path / "c" / "edgekv"
    monkeypatch.setenv("XDG_CACHE_HOME", "c")
    assert user_folder("XDG_CACHE_HOME", ".cache") == tmp_path / ".cache" / "edgekv"


def test_a_user_without_a_home_has_one_in_the_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert user_folder("XDG_CACHE_HOME", ".cache").is_relative_to(tempfile.gettempdir())
