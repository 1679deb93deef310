"""The C interface to the ExecuTorch runtime: found, compiled once, and loaded, without torch.

The `executorch` wheel holds the runtime as libraries that do not need torch, and their headers. `shim.cpp` is compiled
against them on first use, in about two seconds, into the user's cache folder. The file's name holds everything that it
depends on, so that another version, compiler or source makes another file.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import EngineError, EngineMissing

MAX_DIMS = 8
DELEGATE = "XnnpackBackend"
_LIBRARIES = ("executorch", "executorch_threadpool", "executorch_kernels_optimized", "executorch_backend_xnnpack")
_DTYPES = {"uint8": 0, "int8": 1, "int16": 2, "int32": 3, "int64": 4, "float16": 5, "float32": 6, "float64": 7, "bool": 11}
_NAMES = {code: name for name, code in _DTYPES.items()}


class TensorStruct(ctypes.Structure):
    """A tensor as the C interface describes it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size_bytes", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("n_dims", ctypes.c_int32),
        ("sizes", ctypes.c_int32 * MAX_DIMS),
    )


class NoCompiler(EngineMissing):
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


@functools.lru_cache(maxsize=1)
def load_library(cache: Path) -> Library:
    """Return the library, compiled into ``cache`` if it is not there yet.

    Raises:
        EngineMissing: executorch is not installed, or no compiler is there. EngineError: compiling or loading failed.
    """
    package = package_folder()
    return Library(package, build(package, cache))


def build(package: Path, cache: Path) -> Path:
    """Compile the shim unless it is in ``cache``; returns its path."""
    source = resources.files("edgekv.runtime") / "csrc_executorch" / "shim.cpp"
    text = source.read_bytes()
    compiler = _compiler()
    key = hashlib.sha256(text + f"{version()} {package} {compiler} {platform.machine()}".encode()).hexdigest()[:16]
    path = cache / "executorch" / f"shim-{version()}-{key}.so"
    if path.is_file():
        return path
    if compiler is None:
        raise NoCompiler(
            "the ExecuTorch engine is compiled on first use and no C++ compiler was found; install g++ or clang,"
            " or name one in CXX"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source_file, built = Path(folder) / "shim.cpp", Path(folder) / "shim.so"
        source_file.write_bytes(text)
        include = package / "include"
        command = [
            compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-DC10_USING_CUSTOM_GENERATED_MACROS",
            f"-I{include}", f"-I{include}/executorch/runtime/core/portable_type/c10",
            str(source_file), "-o", str(built),
            f"-L{package}/lib", "-lexecutorch", "-lexecutorch_threadpool",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if "error" in line] or ["no message"]
            raise EngineError(
                f"compiling the ExecuTorch engine against executorch {version()} failed: {errors[0].strip()}"
            )
        os.replace(built, path)
    return path


def _compiler() -> str | None:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


class Library:
    """The loaded library. All methods raise :class:`~edgekv.errors.EngineError` with the runtime's own reason."""

    def __init__(self, package: Path, shim: Path) -> None:
        suffix = "dylib" if sys.platform == "darwin" else "so"
        for name in _LIBRARIES:
            path = package / "lib" / f"lib{name}.{suffix}"
            try:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
                if name == _LIBRARIES[1]:
                    self._c = ctypes.CDLL(str(shim))  # its log handler has to be there before the others speak
            except OSError as error:
                if name in _LIBRARIES[:2] or path.is_file():
                    raise EngineError(f"executorch {version()} cannot be loaded: {error}") from error
                # A delegate or kernel library that is not there: the program says whether it needs it.
        pointer, text, integer = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
        for name, result, arguments in (
            ("error", text, []),
            ("set_threads", integer, [integer]),
            ("open", pointer, [text, text]),
            ("close", None, [pointer]),
            ("has_backend", integer, [text]),
            ("has_method", integer, [pointer, text]),
            ("method", pointer, [pointer, text]),
            ("describe", integer, [pointer, integer, integer, pointer]),
            ("bind", pointer, [pointer, pointer, integer, pointer, integer]),
            ("unbind", None, [pointer]),
            ("run", integer, [pointer, integer]),
            ("output_sizes", integer, [pointer, integer, pointer]),
        ):
            function = getattr(self._c, f"edgekv_et_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, f"_{name}", function)

    def set_threads(self, threads: int) -> None:
        """Set the number of threads of every program of this process."""
        if self._set_threads(threads):
            raise EngineError(f"executorch: {self._reason()}")

    def open(self, path: Path, packed_cache: Path | None) -> Program:
        """Open a program, mapped into memory.

        Args:
            packed_cache: file that keeps the weights as the CPU reads them; None packs them into RAM at each start.
        """
        if not self._has_backend(DELEGATE.encode()):
            raise EngineError(
                f"executorch {version()} has no {DELEGATE} on this machine; install a build of it that does"
            )
        handle = self._open(os.fsencode(path), os.fsencode(packed_cache) if packed_cache else b"")
        if not handle:
            raise EngineError(f"executorch {version()} cannot load {path}: {self._reason()}; export the bundle again")
        return Program(self, path, handle)

    def _reason(self) -> str:
        return str(self._error().decode(errors="replace").splitlines()[0])


class Program:
    """An open .pte file."""

    def __init__(self, library: Library, path: Path, handle: int) -> None:
        self._library, self.path, self._handle = library, path, handle
        self._methods: dict[str, Method] = {}

    def has_method(self, name: str) -> bool:
        """Whether the program has a method of this name."""
        return bool(self._library._has_method(self._handle, name.encode()))

    def method(self, name: str) -> Method:
        """Load a method, once."""
        if name not in self._methods:
            handle = self._library._method(self._handle, name.encode())
            if not handle:
                raise EngineError(
                    f"executorch {version()} cannot load {self.path}: {self._library._reason()};"
                    " export the bundle again with this version"
                )
            self._methods[name] = Method(self._library, name, handle)
        return self._methods[name]

    def close(self) -> None:
        """Free the program and all of its methods; calls must not run any more."""
        if getattr(self, "_handle", 0):
            self._methods.clear()
            self._library._close(self._handle)
            self._handle = 0

    __del__ = close


class Method:
    """A loaded method of a program."""

    def __init__(self, library: Library, name: str, handle: int) -> None:
        self._library, self.name, self._handle = library, name, handle

    def describe(self, direction: str) -> list[tuple[str, tuple[int, ...]]]:
        """Return dtype and largest shape of each input (``in``) or output (``out``)."""
        found, struct = [], TensorStruct()
        while not self._library._describe(self._handle, direction == "out", len(found), ctypes.byref(struct)):
            found.append((_NAMES.get(struct.dtype, str(struct.dtype)), tuple(struct.sizes[: struct.n_dims])))
        return found

    def bind(self, inputs: Sequence[NDArray[np.generic]], outputs: Sequence[NDArray[np.generic]]) -> Call:
        """Bind the method to arrays that it reads and writes in place.

        Raises:
            EngineError: a dtype or shape that the program does not take.
        """
        for direction, arrays in (("in", inputs), ("out", outputs)):
            for (dtype, largest), array in zip(self.describe(direction), arrays, strict=False):
                fits = len(largest) == array.ndim and all(a <= b for a, b in zip(array.shape, largest, strict=False))
                if array.dtype.name != dtype or not fits or not array.flags.c_contiguous:
                    raise EngineError(
                        f"executorch: {self.name} takes {direction}put {dtype} {list(largest)},"
                        f" not {array.dtype.name} {list(array.shape)}; export the bundle again"
                    )
        return Call(self._library, self._handle, inputs, outputs)

    def output_shape(self, index: int) -> tuple[int, ...]:
        """Return the shape of an output of the last run."""
        sizes = (ctypes.c_int32 * MAX_DIMS)()
        n_dims = self._library._output_sizes(self._handle, index, sizes)
        return tuple(sizes[:n_dims])


class Call:
    """A method and the arrays that it was bound to, which it keeps alive."""

    def __init__(
        self, library: Library, method: int, inputs: Sequence[NDArray[np.generic]], outputs: Sequence[NDArray[np.generic]]
    ) -> None:
        self._library, self._arrays = library, (*inputs, *outputs)
        given, wanted = _structs(inputs), _structs(outputs)
        self.handle: int = library._bind(method, given, len(inputs), wanted, len(outputs)) or 0
        if not self.handle:
            raise EngineError(f"executorch: {library._reason()}; export the bundle again")

    def __del__(self) -> None:
        if getattr(self, "handle", 0):
            self._library._unbind(self.handle)


class CallList:
    """Calls that run one after the other, in one step out of Python."""

    def __init__(self, library: Library, calls: Sequence[Call]) -> None:
        self._library, self._calls = library, list(calls)
        self._handles = (ctypes.c_void_p * len(calls))(*(call.handle for call in calls))

    def run(self) -> None:
        """Run them; the GIL is released meanwhile.

        Raises:
            EngineError: the runtime refused a call.
        """
        if self._library._run(self._handles, len(self._calls)):
            raise EngineError(f"executorch: {self._library._reason()}")


def _structs(arrays: Sequence[NDArray[np.generic]]) -> ctypes.Array[TensorStruct]:
    result = (TensorStruct * len(arrays))()
    for struct, array in zip(result, arrays, strict=True):
        struct.data, struct.size_bytes, struct.dtype = array.ctypes.data, array.nbytes, _DTYPES[array.dtype.name]
        struct.n_dims = array.ndim
        struct.sizes[: array.ndim] = array.shape
    return result
