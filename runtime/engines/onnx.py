"""ONNX Runtime as the engine of the split form: one session per segment, bound once to fixed buffers."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgekv.bundle import Manifest
from edgekv.errors import EngineError
from edgekv.runtime.engines.base import Float, StepBuffers
from edgekv.runtime.engines.mapped import release_mapped_pages

#: Where every session has threads of its own, a worker that waits for work spins this long, then sleeps: long enough for
#: the gaps between the products of a segment, short enough that the pools of all segments do not spin against each other.
SPIN_US = 50


def session_options(threads: int, weights: str, *, shared: bool) -> ort.SessionOptions:
    """Return session options for a process that runs many small sessions in turn.

    Args:
        weights: the bundle's weight type. Products with 4-bit weights run on our kernels where the processor has
            instructions that they use (AVX-512 VNNI, AMX): twice as fast for a token, five times for a chunk, and the
            weights stay mapped, where ONNX Runtime's own copy them into another order.
        shared: the process has one pool of threads for all sessions; else each gets its own.
    """
    _share_arena()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Shapes change between prefill and decoding; a pattern per shape and session would only keep memory.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.use_per_session_threads = not shared
    if weights == "int4":
        _register_operators(options)
    if not shared:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
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
    if not _register_operators(ort.SessionOptions()):
        return 0
    from edgekv.runtime import _kernels

    return _kernels.onnxruntime_executor()


def describe(weights: str) -> str:
    """Return what computes a bundle of this weight type, for people."""
    name = f"onnxruntime {ort.__version__}"
    if weights != "int4" or not _register_operators(ort.SessionOptions()):
        return name
    from edgekv.runtime import _kernels

    ours = _kernels.dense_names()
    return f"{name}, 4-bit products by edgekv ({ours})" if ours else name


def _register_operators(options: ort.SessionOptions) -> bool:
    """Let sessions use the operators of the native kernels; return whether there are any."""
    try:
        from edgekv.runtime import _kernels

        options.register_custom_ops_library(_kernels.__file__)
    except Exception:  # no native kernels, or an ONNX Runtime without custom operators
        return False
    return True


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


class OnnxSegments:
    """A :class:`~edgekv.runtime.engines.base.SegmentEngine` on ONNX Runtime."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int, *, own_process: bool) -> None:
        """Open a bundle.

        Args:
            own_process: whether :func:`share_threads` is allowed.

        Raises:
            EngineError: ONNX Runtime refused a graph.
        """
        self.description = describe(manifest.weights)
        self._model = manifest.model
        if own_process:
            share_threads(threads)
        self.executor = lend_threads()
        options = session_options(threads, manifest.weights, shared=own_process or self.executor != 0)
        weights = manifest.embedding.file if manifest.embedding else ""
        self._sessions = []
        for index, name in enumerate(manifest.graphs):
            self._sessions.append(open_session(folder / name, options))
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
