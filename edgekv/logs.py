"""What engines and libraries say of themselves: not on the terminal, unless ``EDGEKV_LOG`` asks for it.

``EDGEKV_LOG=warning`` (or debug, info, error), or ``edgekv --verbose COMMAND``, which is ``info``. What edgekv itself warns of
is always shown. A program that uses edgekv as a library decides with :mod:`logging`, as for every other.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from edgekv.settings import LOG

#: What ONNX Runtime calls a level; fatal when nothing is asked for: whatever else happens comes back as an error.
_ORT_SEVERITIES = {"debug": 0, "info": 1, "warning": 2, "error": 3}
_ORT_FATAL = 4


def asked() -> str | None:
    """Return the level that ``EDGEKV_LOG`` asks for, or None.

    Raises:
        UsageError: it is no level.
    """
    return LOG.environment(LOG.name)


def ort_severity() -> int:
    """Return the lowest severity of which ONNX Runtime shall write."""
    return _ORT_SEVERITIES.get(asked() or "", _ORT_FATAL)


def show_logs() -> None:
    """Set up logging for a process that is ours: the warnings of edgekv, and of everything else what was asked for."""
    level = asked()
    logging.captureWarnings(True)
    root, own = logging.getLogger(), logging.getLogger("edgekv")
    for logger in (root, own):
        logger.handlers.clear()
    if level is None:
        root.addHandler(logging.NullHandler())
        own.addHandler(logging.StreamHandler())
        own.propagate = False
    else:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", level.upper())
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
        root.addHandler(handler)
        root.setLevel(level.upper())


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the notes of a library's Python code off the terminal: warnings, log lines, prints."""
    if asked() is not None:
        yield
        return
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def quiet_while_loading() -> Iterator[None]:
    """Keep what native code writes to stderr, while it is loaded, off the terminal."""
    try:
        kept = os.dup(2) if asked() is None else None
    except OSError:  # there is no stderr
        kept = None
    if kept is None:
        yield
        return
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
