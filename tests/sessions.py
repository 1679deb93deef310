"""ONNX Runtime sessions of tests, beside those of the runtime in the same process."""

from __future__ import annotations

import onnxruntime as ort

from edgekv.runtime.engines.onnx.options import lend_threads


def session_options(threads: int = 2) -> ort.SessionOptions:
    """Return options for a session: where a test before gave the process one pool of threads, all must use it."""
    options = ort.SessionOptions()
    options.use_per_session_threads = not lend_threads()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    return options
