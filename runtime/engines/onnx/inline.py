"""ONNX Runtime as the engine of the inline form: the whole decoder in one graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgekv.bundle import Manifest
from edgekv.ort import onnxruntime as ort

from .options import check_contract, failure, open_session, our_products, set_up


class OnnxInline:
    """An :class:`~edgekv.runtime.engines.base.InlineEngine` on ONNX Runtime."""

    max_tokens: int | None = None

    def __init__(self, folder: Path, manifest: Manifest, threads: int, *, own_process: bool) -> None:
        ours = our_products(manifest.kinds(manifest.graphs[0]))
        sessions = set_up(ours, threads, own_process=own_process, shared_arena=False)
        self.description = sessions.description
        path = folder / manifest.graphs[0]
        self._name = path.name
        self._session = open_session(path, sessions.options)
        if _promises_equal_layers(self._session):
            sessions.options.enable_mem_reuse = False
            self._session = open_session(path, sessions.options)
        check_contract(self._session, manifest.inline_spec(), path)
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run a step and return its outputs by name."""
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise failure(self._name, error) from error


def _promises_equal_layers(session: ort.InferenceSession) -> bool:
    """Say whether the layers of a graph call their numbers of pages by one name, as the first bundles did.

    ONNX Runtime then plans with buffers of equal size, and fails when layers hold different numbers of pages.
    """
    pages = [tensor.shape[0] for tensor in session.get_inputs() if tensor.name.startswith("key_pages.")]
    return len(pages) > 1 and len(set(pages)) == 1
