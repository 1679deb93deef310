"""Opens the engine that a bundle was exported for."""

from __future__ import annotations

from pathlib import Path

from edgekv.bundle import Manifest

from .base import InlineEngine, SegmentEngine
from .first_contract import FirstContract


def open_segments(folder: Path, manifest: Manifest, threads: int, cache: Path, *, own_process: bool) -> SegmentEngine:
    """Open the segments of a split bundle.

    Args:
        cache: folder for what an engine makes once per machine.
        own_process: the program around us runs nothing else on the engine.

    Raises:
        EngineMissing: a package that the bundle needs is not installed. EngineError: the engine refused a graph.
    """
    if manifest.engine == "executorch":
        from .executorch.build import NoShim
        from .executorch.segments import ExecutorchSegments

        try:
            return ExecutorchSegments(folder, manifest, threads, cache)
        except NoShim as error:
            if manifest.operators == "edgekv":
                raise  # the Python bindings have no such operators
            from .executorch.bindings import PybindSegments

            return PybindSegments(folder, manifest, threads, str(error))
    from .onnx.segments import OnnxSegments

    return OnnxSegments(folder, manifest, threads, own_process=own_process)


def open_inline(folder: Path, manifest: Manifest, threads: int, cache: Path, *, own_process: bool) -> InlineEngine:
    """Open the graph of an inline bundle; see :func:`open_segments`."""
    engine: InlineEngine
    if manifest.engine == "executorch":
        from .executorch.first_inline import FirstExecutorchInline
        from .executorch.inline import ExecutorchInline

        kind = FirstExecutorchInline if manifest.contract_version == 1 else ExecutorchInline
        engine = kind(folder, manifest, threads, cache)
    else:
        from .onnx.inline import OnnxInline

        engine = OnnxInline(folder, manifest, threads, own_process=own_process)
    return FirstContract(engine, manifest.model) if manifest.contract_version == 1 else engine
