"""Finding and reading profile files: the bundled ones, and the user's own, which shadow them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edgekv.errors import FormatError, ProfileError
from edgekv.host import user_folder
from edgekv.schema import did_you_mean, plain_toml, read_whole, shown

from .parse import parse_profile
from .schema import DeviceProfile

BUNDLED_DIR = Path(__file__).parent


class Difference(NamedTuple):
    """A field in which two profiles differ; None where a profile does not have it."""

    field: str
    first: str | None
    second: str | None


def user_dir() -> Path:
    """Return the folder of the user's own profiles; it need not exist."""
    return user_folder("XDG_CONFIG_HOME", ".config") / "profiles"


def names() -> list[str]:
    """Return the names of all profiles, bundled and the user's, sorted."""
    return sorted({path.stem for folder in (user_dir(), BUNDLED_DIR) for path in folder.glob("*.toml")})


def load(name_or_path: str | os.PathLike[str]) -> DeviceProfile:
    """Load a profile by name, or from a file.

    Args:
        name_or_path: a name from :func:`names`, or the path of a ``.toml`` file. A profile in :func:`user_dir`
            shadows a bundled one of the same name.

    Raises:
        ProfileError: there is no such profile, or the file is not a valid one; the message names file, field and fix.
    """
    path = _find(name_or_path, ())
    return parse_profile(_read(path, ()), path)


def load_many(names_or_paths: Iterable[str | os.PathLike[str]]) -> tuple[list[DeviceProfile], list[ProfileError]]:
    """Load several profiles; return the good ones and what is wrong with the others."""
    profiles, problems = [], []
    for name_or_path in names_or_paths:
        try:
            profiles.append(load(name_or_path))
        except ProfileError as error:
            problems.append(error)
    return profiles, problems


def diff(first: DeviceProfile, second: DeviceProfile) -> list[Difference]:
    """Return the fields whose values differ, those of the second alone last; sources are not compared."""
    a, b = first.entries(), second.entries()
    rows = []
    for key in [*a, *(key for key in b if key not in a)]:
        # Values are compared, not their printed forms: rounding must not hide a difference.
        if _value(a.get(key)) != _value(b.get(key)):
            rows.append(Difference(key, str(a[key]) if key in a else None, str(b[key]) if key in b else None))
    return rows


def _value(entry: Any) -> Any:
    return getattr(entry, "value", entry)


def _find(name_or_path: str | os.PathLike[str], chain: tuple[Path, ...]) -> Path:
    """Return the file of a profile, leaving out those in ``chain``: a user's profile may extend the one it shadows."""
    text = os.fspath(name_or_path)
    if not isinstance(name_or_path, str) or text.endswith(".toml") or "/" in text or os.sep in text:
        return Path(text)
    for folder in (user_dir(), BUNDLED_DIR):
        path = folder / f"{text}.toml"
        if path.is_file() and path.resolve() not in chain:
            return path
        if os.path.lexists(path) and not path.is_file():
            raise ProfileError(f"{path} is no file that can be read as a profile; remove it")
    if text in names():
        raise ProfileError(f"{chain[-1]}: extends = {text!r} leads back to itself; extend another profile")
    problem = f"{chain[-1]}: extends names the unknown profile {text!r}" if chain else f"no profile is named {text!r}"
    way_out = f"{did_you_mean(text, names())} `edgekv profiles list` shows all, yours go to {user_dir()}".lstrip()
    raise ProfileError(f"{problem}; {way_out}")


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    """Read a file and merge it over the one that it extends."""
    try:
        data = plain_toml(read_whole(path))
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror}); give a name or a .toml file") from error
    except FormatError as error:
        raise ProfileError(f"{path}: {error}") from error
    if "extends" not in data:
        return data
    if not isinstance(data["extends"], str):
        raise ProfileError(f"{path}: extends is {shown(data['extends'])}, not a text; write the name of a profile")
    chain = (*chain, path.resolve())
    base_path = _find(data["extends"], chain)
    base = _read(base_path, chain)
    parse_profile(base, base_path)  # a fault of the base is reported with the base's file
    for own in ("name", "title", "extends"):
        base.pop(own, None)
    return _merge(base, data)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge tables; an entry with a value is replaced whole, so that a number keeps its own source."""
    merged = dict(base)
    for key, value in over.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and not {"value"} & (value.keys() | below.keys()):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged
