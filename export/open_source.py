"""Opens what a user names as a source: a checkpoint folder, a GGUF file, a name on the hub, or ``demo``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from edgekv.errors import EngineMissing

from .hub import fetch_source

if TYPE_CHECKING:
    from .checkpoint import Checkpoint


@contextlib.contextmanager
def opened_source(source: str | Path, context: int | None = None) -> Iterator[Checkpoint]:
    """Open a checkpoint; its files are there until the block ends.

    Args:
        context: the most tokens of a text; None: as many as the model was made for. Models with longrope need it.

    Raises:
        CheckpointError: it cannot be read, or is not one that edgekv decodes. EngineMissing: a package is not installed.
        UsageError: the context cannot be had.
    """
    with contextlib.ExitStack() as stack:
        path = fetch_source(source)
        if str(source) == "demo":
            path = stack.enter_context(resources.as_file(resources.files("edgekv.export") / "demo_model"))
        try:
            from .checkpoint import open_checkpoint
            from .gguf.checkpoint import open_gguf
            from .gguf.file import is_gguf
        except ImportError as error:
            raise missing(error) from error
        yield (open_gguf if is_gguf(path) else open_checkpoint)(path, context)


def missing(error: ImportError) -> EngineMissing:
    """Return the error of ours for a package of the extra ``export`` that is not installed."""
    return EngineMissing(f'exporting needs {error.name}; install it: pip install "edgekv[export]"')
