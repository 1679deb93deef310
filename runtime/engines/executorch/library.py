"""The C interface to the ExecuTorch runtime, loaded with ctypes: programs, methods, and calls bound to arrays."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.contract import Dim, GraphSpec
from edgekv.errors import EngineError

from .build import built_shim, package_folder, version

MAX_DIMS = 8
DELEGATE = "XnnpackBackend"
_LIBRARIES = ("executorch", "executorch_threadpool", "executorch_kernels_optimized", "executorch_backend_xnnpack")
_DTYPES = {
    "uint8": 0, "int8": 1, "int16": 2, "int32": 3, "int64": 4, "float16": 5, "float32": 6, "float64": 7, "bool": 11,
}  # fmt: skip
_NAMES = {code: name for name, code in _DTYPES.items()}


@functools.lru_cache(maxsize=1)
def load_library(cache: Path) -> Library:
    """Return the library, compiled into ``cache`` if it is not there yet.

    Raises:
        EngineMissing: executorch is not installed. NoShim: it cannot be compiled. EngineError: it cannot be loaded.
    """
    package = package_folder()
    with built_shim(package, cache) as shim:
        return Library(package, shim)


class TensorStruct(ctypes.Structure):
    """A tensor as the C interface describes it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size_bytes", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("n_dims", ctypes.c_int32),
        ("sizes", ctypes.c_int32 * MAX_DIMS),
    )


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
        self._open: weakref.WeakSet[Program] = weakref.WeakSet()
        self.functions: Any = SimpleNamespace()
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
            ("set_operators", integer, [pointer]),
        ):
            function = getattr(self._c, f"edgekv_et_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self.functions, name, function)

    def set_threads(self, threads: int) -> None:
        """Set the number of threads of every program of this process; it stays while one is open, which holds the pool."""
        if not self._open and self.functions.set_threads(threads):
            raise EngineError(f"executorch: {self._reason()}")

    def set_operators(self, threads: int) -> tuple[str, int]:
        """Let programs use the operators of the native kernels.

        Returns:
            what those use of the processor, and the address of the function that lends their threads to attention.

        Raises:
            EngineError: the native kernels are not there.
        """
        try:
            _kernels = importlib.import_module("edgekv.runtime._kernels")
        except ImportError as error:
            raise EngineError(
                "this bundle was exported with --operators edgekv and needs the native kernels, which are not built;"
                " reinstall edgekv where there is a C++ compiler, or export the bundle with --operators xnnpack"
            ) from error
        if self.functions.set_operators(_kernels.operators(threads)):
            raise EngineError("the native kernels and the ExecuTorch shim are of different versions; reinstall edgekv")
        names = _kernels.dense_names() or "portable, slow on this processor: --operators xnnpack is faster"
        return names, int(_kernels.operator_threads())

    @property
    def executor(self) -> int:
        """Address of the function that lends ExecuTorch's threads to the kernels.

        They spin for about half a millisecond after each call, longer than a kernel takes: others find no free core.
        """
        return ctypes.cast(self._c.edgekv_et_parallel, ctypes.c_void_p).value or 0

    def open(self, path: Path, packed_cache: Path | None) -> Program:
        """Open a program, mapped into memory.

        Args:
            packed_cache: file that keeps the weights as the CPU reads them; None packs them into RAM at each start.
        """
        if not self.functions.has_backend(DELEGATE.encode()):
            raise EngineError(
                f"executorch {version()} has no {DELEGATE} on this machine; install a build of it that does"
            )
        handle = self.functions.open(os.fsencode(path), os.fsencode(packed_cache) if packed_cache else b"")
        if not handle:
            raise EngineError(f"executorch {version()} cannot load {path}: {self._reason()}; export the bundle again")
        program = Program(self, path, handle)
        self._open.add(program)
        return program

    def _reason(self) -> str:
        return str(self.functions.error().decode(errors="replace").splitlines()[0])


class Program:
    """An open .pte file."""

    def __init__(self, library: Library, path: Path, handle: int) -> None:
        self._library, self.path, self._handle = library, path, handle
        self._methods: dict[str, Method] = {}

    def has_method(self, name: str) -> bool:
        """Whether the program has a method of this name."""
        return bool(self._library.functions.has_method(self._handle, name.encode()))

    def method(self, name: str) -> Method:
        """Load a method, once."""
        if name not in self._methods:
            handle = self._library.functions.method(self._handle, name.encode())
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
            self._library.functions.close(self._handle)
            self._library._open.discard(self)
            self._handle = 0

    __del__ = close


class Method:
    """A loaded method of a program."""

    def __init__(self, library: Library, name: str, handle: int) -> None:
        self._library, self.name, self._handle = library, name, handle

    def describe(self, direction: str) -> list[tuple[str, tuple[int, ...]]]:
        """Return dtype and largest shape of each input (``in``) or output (``out``)."""
        found: list[tuple[str, tuple[int, ...]]] = []
        struct = TensorStruct()
        while not self._library.functions.describe(self._handle, direction == "out", len(found), ctypes.byref(struct)):
            found.append((_NAMES.get(struct.dtype, str(struct.dtype)), tuple(struct.sizes[: struct.n_dims])))
        return found

    def bind(
        self, spec: GraphSpec, inputs: Sequence[NDArray[np.generic]], outputs: Sequence[NDArray[np.generic]]
    ) -> Call:
        """Bind the method to arrays that it reads and writes in place.

        Args:
            spec: the contract that the method keeps, which names inputs and outputs.

        Raises:
            EngineError: a dtype or shape that the program does not take.
        """
        for direction, tensors, arrays in (("in", spec.inputs, inputs), ("out", spec.outputs, outputs)):
            found = self.describe(direction)
            if len(found) != len(arrays):
                raise EngineError(
                    f"executorch: {self.name} has {len(found)} {direction}puts, the manifest asks for {len(arrays)};"
                    " export the bundle again"
                )
            for tensor, (dtype, largest), array in zip(tensors, found, arrays, strict=False):
                if array.dtype.name != dtype or not _fits(array, largest, tensor.shape):
                    raise EngineError(
                        f"executorch: {self.name} takes {direction}put {tensor.name} as {dtype} {list(largest)},"
                        f" not {array.dtype.name} {list(array.shape)} (docs/contract.md); if that is what the manifest"
                        " says, export the bundle again"
                    )
        return Call(self._library, self._handle, inputs, outputs)

    def output_shape(self, index: int) -> tuple[int, ...]:
        """Return the shape of an output of the last run."""
        sizes = (ctypes.c_int32 * MAX_DIMS)()
        n_dims = self._library.functions.output_sizes(self._handle, index, sizes)
        return tuple(sizes[:n_dims])


class Call:
    """A method and the arrays that it was bound to, which it keeps alive."""

    def __init__(
        self,
        library: Library,
        method: int,
        inputs: Sequence[NDArray[np.generic]],
        outputs: Sequence[NDArray[np.generic]],
    ) -> None:
        self._library, self._arrays = library, (*inputs, *outputs)
        given, wanted = _structs(inputs), _structs(outputs)
        self.handle: int = library.functions.bind(method, given, len(inputs), wanted, len(outputs)) or 0
        if not self.handle:
            raise EngineError(f"executorch: {library._reason()}; export the bundle again")

    def __del__(self) -> None:
        if getattr(self, "handle", 0):
            self._library.functions.unbind(self.handle)


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
        if self._library.functions.run(self._handles, len(self._calls)):
            raise EngineError(f"executorch: {self._library._reason()}")


def _fits(array: NDArray[np.generic], largest: tuple[int, ...], contract: tuple[Dim, ...]) -> bool:
    """Whether an array is laid out as a method takes it: dimensions that the contract names may be smaller."""
    if array.ndim != len(largest) or array.ndim != len(contract) or not array.flags.c_contiguous:
        return False
    sizes = zip(array.shape, largest, contract, strict=True)
    return all(size == most or (size < most and isinstance(dim, str)) for size, most, dim in sizes)


def _structs(arrays: Sequence[NDArray[np.generic]]) -> ctypes.Array[TensorStruct]:
    result = (TensorStruct * len(arrays))()
    for struct, array in zip(result, arrays, strict=True):
        struct.data, struct.size_bytes, struct.dtype = array.ctypes.data, array.nbytes, _DTYPES[array.dtype.name]
        struct.n_dims = array.ndim
        struct.sizes[: array.ndim] = array.shape
    return result
