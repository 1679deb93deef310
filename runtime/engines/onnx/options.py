"""How ONNX Runtime is set up in this process: threads, memory, and our products in place of its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekv.contract import GraphSpec
from edgekv.errors import BundleError, EngineError
from edgekv.logs import ort_severity
from edgekv.ort import onnxruntime as ort

#: Where every session has threads of its own, a worker that waits for work spins this long, then sleeps: long enough for
#: the gaps between the products of a segment, short enough that the pools of all segments do not spin against each other.
SPIN_US = 50
_ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int8": "tensor(int8)",
    "int64": "tensor(int64)",
    "bool": "tensor(bool)",
}


@dataclass(frozen=True)
class OrtSetup:
    """How the sessions of a bundle are opened.

    ``options``: of graphs whose products are ours, where any are. ``engines_own``: of the others.
    """

    options: ort.SessionOptions
    engines_own: ort.SessionOptions
    #: Address of the function that lends the threads of the dense products to attention; 0 if they cannot be lent.
    executor: int
    #: What computes, for people.
    description: str


def our_products(kinds: Collection[str]) -> bool:
    """Say whether our kernels know all integer matrices of a graph, by how they are stored: they have 4 bits."""
    return "int4" in kinds and "int8" not in kinds


def set_up(ours: bool, threads: int, *, own_process: bool, shared_arena: bool = True) -> OrtSetup:
    """Set up a process for many small sessions that run in turn.

    Products with int4 weights run on our kernels and our threads where the processor has instructions that the kernels
    use (AVX-512 VNNI, AMX; NEON): with the former twice as fast for a token, five times for a chunk, and the weights stay
    mapped, where ONNX Runtime copies them into another order.

    Args:
        ours: there are graphs of which :func:`our_products` is true.
        own_process: whether :func:`share_threads` is allowed.
        shared_arena: all sessions compute in one arena, which grows by what is asked for. Where sizes grow from step to step it
            would keep a block of every size; a session's own grows by doubling, and its blocks serve for what comes.
    """
    name = f"onnxruntime {ort.__version__}"
    if own_process:
        ort.set_default_logger_severity(ort_severity())
    kernels = _native_kernels()
    options = _options(shared_arena=shared_arena)
    if kernels and ours and (names := kernels.dense_names()):
        kernels.operators(threads)
        options.register_custom_ops_library(kernels.__file__)
        # What is not a product is small. More threads than ours would only be in their way.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.use_per_session_threads = not kernels.onnxruntime_executor()
        said = f"{name}, 4-bit products by edgekv ({names})"
        return OrtSetup(
            options, _with_threads(_options(shared_arena=shared_arena), threads), kernels.operator_threads(), said
        )
    if own_process:
        share_threads(threads)
    lent = lend_threads()
    options.use_per_session_threads = not own_process and not lent
    if options.use_per_session_threads:
        _with_threads(options, threads)
    return OrtSetup(options, options, lent, name)


def _with_threads(options: ort.SessionOptions, threads: int) -> ort.SessionOptions:
    """Give a session threads of its own."""
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    return options


def _options(*, shared_arena: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    if shared_arena:
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    options.log_severity_level = ort_severity()
    # Shapes change between prefill and decoding; a pattern per shape and session would only keep memory.
    options.enable_mem_pattern = False
    return options


def share_threads(threads: int) -> None:
    """Give all ONNX Runtime sessions of this process one pool of threads, unless it has one.

    A worker is then awake when the next segment starts. With a pool per session a dense token took 14.4 ms instead of
    12.1: 25 times a thread was woken. But every other session of the process must agree (``use_per_session_threads``
    off, or ONNX Runtime refuses it), so this is for programs that own their process.
    """
    with contextlib.suppress(Exception):  # there is one already: that one serves
        ort.set_global_thread_pool_sizes(threads, 1)


def lend_threads() -> int:
    """Return the address of the function that runs the kernels' tasks on that pool; 0 if there is none."""
    kernels = _native_kernels()
    return int(kernels.onnxruntime_executor()) if kernels else 0


def _native_kernels() -> Any:
    """Return the native kernels, told where this ONNX Runtime is; None without them or without custom operators."""
    try:
        from ... import _kernels

        ort.SessionOptions().register_custom_ops_library(_kernels.__file__)
    except Exception:
        return None
    return _kernels


@functools.cache
def _share_arena() -> None:
    """Give all sessions of the process one arena for what they compute: only one of them runs at a time."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # It grows by what is asked for, not by doubling.
    arena = ort.OrtArenaCfg({"arena_extend_strategy": 1, "initial_chunk_size_bytes": 1 << 20})
    with contextlib.suppress(Exception):  # the program around us registered one: that one serves
        ort.create_and_register_allocator(memory, arena)


def open_session(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """Load a graph.

    Raises:
        EngineError: ONNX Runtime refused it.
    """
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise EngineError(f"onnxruntime {ort.__version__} cannot load {path}: {_reason(error)}") from error


def failure(graph: str, error: Exception) -> EngineError:
    """Return the error of ours for what ONNX Runtime raised while it ran a graph."""
    return EngineError(f"onnxruntime {ort.__version__} failed in {graph}: {_reason(error)}")


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0]


def check_contract(session: ort.InferenceSession, spec: GraphSpec, path: Path) -> None:
    """Refuse a graph whose tensors are not those that the manifest's numbers ask for: buffers are made by these numbers.

    Raises:
        BundleError: the message names the tensor.
    """
    for found, wanted in ((session.get_inputs(), spec.inputs), (session.get_outputs(), spec.outputs)):
        shapes = {tensor.name: (_ORT_TYPES[tensor.dtype], tensor.shape) for tensor in wanted}
        for tensor in found:
            dtype, shape = shapes.pop(tensor.name, ("", ()))
            fits = tensor.type == dtype and len(tensor.shape) == len(shape)
            # Dimensions that vary from step to step are names.
            pairs = [
                pair for pair in zip(tensor.shape, shape, strict=False) if all(isinstance(dim, int) for dim in pair)
            ]
            if not fits or any(there != asked for there, asked in pairs):
                raise BundleError(
                    f"{path} has {tensor.name} as {tensor.type} {tensor.shape}, the manifest asks for"
                    f" {dtype or 'none'} {list(shape)}; export the bundle again"
                )
        if shapes and wanted is spec.outputs:
            raise BundleError(f"{path} has no output {next(iter(shapes))}; export the bundle again")
