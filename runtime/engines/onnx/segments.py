"""ONNX Runtime as the engine of the split form: one session per segment, bound once to fixed buffers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekv.bundle import Manifest
from edgekv.contract import segment_spec
from edgekv.ort import onnxruntime as ort

from ..base import Float, StepBuffers, outdated
from .mapped import release_mapped_pages
from .options import check_contract, failure, open_session, our_products, set_up


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
        ours = [our_products(manifest.kinds(name)) for name in manifest.graphs]
        sessions = set_up(any(ours), threads, own_process=own_process)
        self.description, self.executor = sessions.description, sessions.executor
        weights = manifest.embedding.file if manifest.embedding else ""
        self._names = manifest.graphs
        self._sessions = []
        for index, name in enumerate(manifest.graphs):
            options = sessions.options if ours[index] else sessions.engines_own
            self._sessions.append(open_session(folder / name, options))
            check_contract(self._sessions[-1], segment_spec(manifest.model, index), folder / name)
            if (index + 1) % 6 == 0 or index + 1 == len(manifest.graphs):
                release_mapped_pages(folder / weights)
        self._prepared: dict[int, tuple[StepBuffers, list[ort.IOBinding]]] = {}
        self._heads: dict[int, tuple[Float, Float, Float, ort.IOBinding]] = {}
        self._bindings: list[ort.IOBinding] = []

    def prepare(self, n_tokens: int) -> StepBuffers:
        """Return buffers for steps of ``n_tokens``; those of few tokens and of the last larger size are kept."""
        if n_tokens not in self._prepared:
            for size in outdated(self._prepared, n_tokens):
                del self._prepared[size]
            self._prepared[n_tokens] = self._bind(n_tokens)
        buffers, self._bindings = self._prepared[n_tokens]
        return buffers

    def run(self, index: int, buffers: StepBuffers) -> None:
        """Run segment ``index`` on the buffers that were prepared last."""
        self._run(index, self._bindings[index])

    def head(self, residual: Float, attention: Float) -> Float:
        """Run the last segment on R rows."""
        rows = residual.shape[0]
        if rows not in self._heads:
            for size in outdated(self._heads, rows):
                del self._heads[size]
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
        self._run(-1, binding)
        return logits

    def _run(self, index: int, binding: ort.IOBinding) -> None:
        try:
            self._sessions[index].run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise failure(self._names[index], error) from error

    def _bind(self, n_tokens: int) -> tuple[StepBuffers, list[ort.IOBinding]]:
        model = self._model

        def empty(*shape: int) -> Float:
            return np.zeros((n_tokens, *shape), np.float32)

        halves = [rope.rotary_dim // 2 for rope in model.ropes]
        buffers = StepBuffers(
            residual=(empty(model.hidden_size), empty(model.hidden_size)),
            cos=tuple(empty(half) for half in halves),
            sin=tuple(empty(half) for half in halves),
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
            _bind_input(binding, "cos", buffers.cos[model.rope_of(index)])
            _bind_input(binding, "sin", buffers.sin[model.rope_of(index)])
            for name in ("q", "k", "v"):
                _bind_output(binding, name, getattr(buffers, name))
            bindings.append(binding)
        return buffers, bindings


def _bind_input(binding: ort.IOBinding, name: str, array: Float) -> None:
    binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)


def _bind_output(binding: ort.IOBinding, name: str, array: Float) -> None:
    binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
