"""Profile files to break on purpose, and a user folder of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgekv.device_profiles import catalog

WriteProfile = Callable[..., Path]


@pytest.fixture(autouse=True)
def user_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty user folder: the profiles of whoever runs the tests must not matter."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config" / "edgekv" / "profiles"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def write_profile(tmp_path: Path) -> WriteProfile:
    """Write a copy of raspberry-pi-5-8gb with parts of its text replaced; return the file."""

    def write(*changes: tuple[str, str], name: str = "broken", folder: Path = tmp_path) -> Path:
        text = (catalog.BUNDLED_DIR / "raspberry-pi-5-8gb.toml").read_text(encoding="utf-8")
        for old, new in (('name = "raspberry-pi-5-8gb"', f'name = "{name}"'), *changes):
            assert old in text, f"the template lacks {old!r}"
            text = text.replace(old, new, 1)
        path = folder / f"{name}.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write
