"""Finds the ExecuTorch runtime and compiles the C interface to it, once, without torch.

The `executorch` wheel holds the runtime as libraries that do not need torch, and their headers. Two sources are compiled
against them on first use, in a few seconds, into the user's cache folder. The file's name holds everything that it
depends on, so that another version or source makes another file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path

from edgekv.errors import EngineMissing
from edgekv.files import make_own_folder, open_file
from edgekv.scratch import ScratchFolder

_log = logging.getLogger(__name__)

SOURCES = ("shim.cpp", "operators.cpp")


class NoShim(EngineMissing):
    """The shim is not compiled yet and cannot be."""


def package_folder() -> Path:
    """Return the folder of the executorch package, without importing it.

    Raises:
        EngineMissing: it is not installed.
    """
    spec = importlib.util.find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        raise EngineMissing(
            "this bundle needs the ExecuTorch runtime; install it: pip install --no-deps executorch (torch is not needed)"
        )
    return Path(next(iter(spec.submodule_search_locations)))


@functools.lru_cache(maxsize=1)
def version() -> str:
    """Return the version of the executorch package."""
    try:
        return metadata.version("executorch")
    except metadata.PackageNotFoundError:
        return "unknown"


@contextlib.contextmanager
def built_shim(package: Path, cache: Path) -> Iterator[Path]:
    """Compile the shim unless it is in ``cache``; gives its path, which may be gone after the block.

    It is code: it is only taken from a file and a folder that nobody else could have written. Without such a folder it is
    compiled for this process alone.

    Raises:
        NoShim: there is no compiler, or it failed.
    """
    folder = resources.files("edgekv.runtime") / "native" / "engines" / "executorch"
    sources = {name: (folder / name).read_bytes() for name in SOURCES}
    made_for = f"{version()} {package} {platform.machine()}".encode()
    key = hashlib.sha256(b"".join(sources.values()) + made_for).hexdigest()[:16]
    path = cache / "executorch" / f"shim-{version()}-{key}.so"
    kept = True
    try:
        make_own_folder(path.parent)
        os.close(open_file(path, os.O_RDONLY, own=True))
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("edgekv: %s is not used: %s", error.filename or path, error.strerror)
        kept = error.filename == str(path)
    else:
        yield path
        return
    compiler = _compiler()
    if compiler is None:
        raise NoShim(
            "the ExecuTorch engine is compiled on first use and no C++ compiler was found; install g++ or clang,"
            " or name one in CXX"
        )
    try:
        with ScratchFolder(path.parent if kept else None, "edgekv-") as scratch:
            for name, text in sources.items():
                (scratch.path / name).write_bytes(text)
            made = _compile(compiler, package, scratch.path)
            made.chmod(0o600)
            yield made.replace(path) if kept else made
    except OSError as error:
        raise NoShim(f"the ExecuTorch engine cannot be written to {path.parent}: {error.strerror}") from error


def _compile(compiler: str, package: Path, folder: Path) -> Path:
    include = package / "include"
    command = [
        compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-DC10_USING_CUSTOM_GENERATED_MACROS",
        f"-I{include}", f"-I{include}/executorch/runtime/core/portable_type/c10",
        *(str(folder / name) for name in SOURCES), "-o", str(folder / "shim.so"),
        f"-L{package}/lib", "-lexecutorch", "-lexecutorch_threadpool",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line] or ["no message"]
        raise NoShim(f"compiling the ExecuTorch engine against executorch {version()} failed: {errors[0].strip()}")
    return folder / "shim.so"


def _compiler() -> str | None:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None
