"""Wheels made of what is installed here, so that tests of a device without a network need none either."""

from __future__ import annotations

import platform
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from itertools import product
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import edgekv

#: Files of edgekv's own that its wheel has.
_OWN = (".py", ".pyi", ".toml", ".json", ".txt", ".html", ".so", ".cpp", ".h", ".typed")


def needed(name: str, extra: str = "") -> list[metadata.Distribution]:
    """Return the distributions that one needs, without itself."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [(name, extra)]
    while waiting:
        name, extra = waiting.pop()
        for line in metadata.requires(name) or []:
            asked = Requirement(line)
            if asked.marker is not None and not asked.marker.evaluate({"extra": extra}):
                continue
            key = canonicalize_name(asked.name)
            if key not in found:
                found[key] = metadata.distribution(key)
                waiting += [(key, "")]
    return list(found.values())


def own_tag() -> str:
    """Return the tag of a wheel for this very Python."""
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    return f"{python}-{python}-linux_{platform.machine()}"


def make_own_wheel(folder: Path, tag: str | None = None) -> Path:
    """Make edgekv's wheel of the files of this checkout, with the kernels that were built for it."""
    root = Path(edgekv.__file__).resolve().parent
    found = metadata.distribution("edgekv")
    info = f"edgekv-{edgekv.__version__}.dist-info"
    path = folder / f"edgekv-{edgekv.__version__}-{tag or own_tag()}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for part in (root, *(entry.resolve() for entry in root.iterdir() if entry.is_symlink())):
            for file in sorted(part.rglob("*")):
                if (
                    file.suffix in _OWN
                    and "__pycache__" not in file.parts
                    and not any(p.is_symlink() for p in file.parents)
                ):
                    wheel.write(file, f"edgekv/{'' if part == root else part.name + '/'}{file.relative_to(part)}")
        kernels = _kernels()
        if not any(name.startswith("edgekv/runtime/_kernels") and name.endswith(".so") for name in wheel.namelist()):
            wheel.write(kernels, f"edgekv/runtime/{kernels.name}")
        wheel.writestr(f"{info}/METADATA", found.read_text("METADATA") or "")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag or own_tag()}\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def _kernels() -> Path:
    from edgekv.runtime import _kernels

    return Path(str(_kernels.__file__))


def make_wheel(found: metadata.Distribution, folder: Path) -> Path:
    """Make a wheel of a distribution that is installed."""
    tags = [
        line.split(": ")[1].split("-") for line in (found.read_text("WHEEL") or "").splitlines() if line[:4] == "Tag:"
    ]
    assert set(map(tuple, tags)) == set(product(*(sorted(set(part)) for part in zip(*tags, strict=True))))
    tag = "-".join(".".join(sorted(set(part))) for part in zip(*tags, strict=True))
    path = folder / f"{found.metadata['Name'].replace('-', '_')}-{found.version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, file in _files(found):
            wheel.write(file, name)
    return path


def _files(found: metadata.Distribution) -> Iterator[tuple[str, Path]]:
    for entry in found.files or []:
        name = entry.as_posix()
        if (
            not name.startswith("..")
            and not name.endswith(".pyc")
            and not name.endswith(("INSTALLER", "direct_url.json"))
        ):
            yield name, Path(str(found.locate_file(entry)))
