"""ONNX Runtime as the engine of the split form: one session per segment, bound once to fixed buffers."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgekv.bundle import Manifest
from edgekv.contract import GraphSpec, segment_spec
from edgekv.errors import BundleError, EngineError
from edgekv.runtime.engines.base import Float, StepBuffers
from edgekv.runtime.engines.mapped import release_mapped_pages

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
class Sessions:
    """How the sessions of a bundle are opened."""

    options: ort.SessionOptions
    #: Address of the function that lends the threads of the dense products to attention; 0 if they cannot be lent.
    executor: int
    #: What computes, for people.
    description: str


def set_up(weights: str, threads: int, *, own_process: bool) -> Sessions:
    """Set up a process for many small sessions that run in turn.

    Products with int4 weights run on our kernels and our threads where the processor has instructions that the kernels
    use (AVX-512 VNNI, AMX): twice as fast for a token, five times for a chunk, and the weights stay mapped, where
    ONNX Runtime copies them into another order.

    Args:
        weights: the bundle's weight type.
        own_process: whether :func:`share_threads` is allowed.
    """
    name = f"onnxruntime {ort.__version__}"
    kernels = _native_kernels()
    options = _options()
    if kernels and weights == "int4" and (ours := kernels.dense_names()):
        kernels.operators(threads)
        options.register_custom_ops_library(kernels.__file__)
        # What is not a product is small. More threads than ours would only be in their way.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.use_per_session_threads = not kernels.onnxruntime_executor()
        return Sessions(options, kernels.operator_threads(), f"{name}, 4-bit products by edgekv ({ours})")
    if own_process:
        share_threads(threads)
    lent = lend_threads()
    options.use_per_session_threads = not own_process and not lent
    if options.use_per_session_threads:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    return Sessions(options, lent, name)


def _options() -> ort.SessionOptions:
    _share_arena()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Shapes change between prefill and decoding; a pattern per shape and session would only keep memory.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.use_env_allocators", "1")
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
        from edgekv.runtime import _kernels

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
        reason = str(error).splitlines()[0]
        raise EngineError(f"onnxruntime {ort.__version__} cannot load {path}: {reason}") from error


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


class OnnxSegments:
    """A :class:`~edgekv.runtime.engines.base.SegmentEngine` on ONNX Runtime."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int, *, own_process: bool) -> None:
        """Open a bundle.

        Args:
            own_process: the program around us runs nothing else on ONNX Runtime, see :func:`set_up`.

        Raises:
            EngineError: ONNX Runtime refused a graph.
        """
        self._model = manifest.model
        sessions = set_up(manifest.weights, threads, own_process=own_process)
        self.description, self.executor = sessions.description, sessions.executor
        weights = manifest.embedding.file if manifest.embedding else ""
        self._sessions = []
        for index, name in enumerate(manifest.graphs):
            self._sessions.append(open_session(folder / name, sessions.options))
            check_contract(self._sessions[-1], segment_spec(manifest.model, index), folder / name)
            if (index + 1) % 6 == 0 or index + 1 == len(manifest.graphs):
                release_mapped_pages(folder / weights)
        self._prepared: dict[int, tuple[StepBuffers, list[ort.IOBinding]]] = {}
        self._heads: dict[int, tuple[Float, Float, Float, ort.IOBinding]] = {}
        self._bindings: list[ort.IOBinding] = []

    def prepare(self, n_tokens: int) -> StepBuffers:
        """Return buffers for steps of ``n_tokens``; those of one token and of the last other size are kept."""
        if n_tokens not in self._prepared:
            for size in [size for size in self._prepared if size != 1]:
                del self._prepared[size]
            self._prepared[n_tokens] = self._bind(n_tokens)
        buffers, self._bindings = self._prepared[n_tokens]
        return buffers

    def run(self, index: int, buffers: StepBuffers) -> None:
        """Run segment ``index`` on the buffers that were prepared last."""
        self._sessions[index].run_with_iobinding(self._bindings[index])

    def head(self, residual: Float, attention: Float) -> Float:
        """Run the last segment on R rows."""
        rows = residual.shape[0]
        if rows not in self._heads:
            self._heads.clear()
            inputs = np.empty_like(residual), np.empty_like(attention)
            logits = np.empty((rows, self._model.vocab_size), np.float32)
            binding = self._sessions[-1].io_binding()
            _bind_input(binding, "residual", inputs[0])
            _bind_input(binding, "attention", inputs[1])
            _bind_output(binding, "logits", logits)
            self._heads[rows] = (*inputs, logits, binding)
        own_residual, own_attention, logits, binding = self._heads[rows]
        own_residual[:] = residual
        own_attention[:] = attention
        self._sessions[-1].run_with_iobinding(binding)
        return logits

    def _bind(self, n_tokens: int) -> tuple[StepBuffers, list[ort.IOBinding]]:
        model = self._model

        def empty(*shape: int) -> Float:
            return np.zeros((n_tokens, *shape), np.float32)

        half = model.rope.rotary_dim // 2
        buffers = StepBuffers(
            residual=(empty(model.hidden_size), empty(model.hidden_size)),
            cos=empty(half),
            sin=empty(half),
            q=empty(model.n_q_heads, model.head_dim),
            k=empty(model.n_kv_heads, model.head_dim),
            v=empty(model.n_kv_heads, model.head_dim),
            attention=empty(model.n_q_heads, model.head_dim),
        )
        bindings = []
        for index, session in enumerate(self._sessions[:-1]):
            binding = session.io_binding()
            _bind_input(binding, "residual", buffers.residual[max(index - 1, 0) % 2])
            if index:
                _bind_input(binding, "attention", buffers.attention)
                _bind_output(binding, "next_residual", buffers.residual[index % 2])
            _bind_input(binding, "cos", buffers.cos)
            _bind_input(binding, "sin", buffers.sin)
            for name in ("q", "k", "v"):
                _bind_output(binding, name, getattr(buffers, name))
            bindings.append(binding)
        return buffers, bindings


def _bind_input(binding: ort.IOBinding, name: str, array: Float) -> None:
    binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)


def _bind_output(binding: ort.IOBinding, name: str, array: Float) -> None:
    binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
