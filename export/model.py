"""The whole export: checkpoint in, bundle out, nothing half-written left behind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from edgekv.bundle import Manifest, file_sha256, write_manifest
from edgekv.contract import ENGINES, FORMS, WEIGHTS
from edgekv.errors import EngineMissing, UsageError

#: Above this many parameters the command line exports int4, below it fp32.
INT4_FROM_PARAMETERS = 100_000_000
Progress = Callable[[str, int, int], None]


def default_weights(parameters: int) -> str:
    """Return the weight kind for a model of this size when none is asked for."""
    return "int4" if parameters >= INT4_FROM_PARAMETERS else "fp32"


def export_model(
    source: str | Path,
    out: Path,
    *,
    engine: str = "onnx",
    form: str = "split",
    weights: str | None = None,
    page_size: int = 32,
    force: bool = False,
    progress: Progress = lambda step, done, total: None,
) -> Manifest:
    """Export a checkpoint to a bundle.

    Args:
        source: a Hugging Face checkpoint folder, or ``demo`` for the bundled model.
        out: the bundle's folder; it appears whole or not at all.
        weights: one of :data:`edgekv.contract.WEIGHTS`; None chooses by size, see :func:`default_weights`.
        force: replace ``out`` if it exists.
        progress: called before each step with its name, the number of steps done, and of all steps.

    Raises:
        CheckpointError: the checkpoint cannot be exported. UsageError: an option is not known, or ``out`` exists.
        Nothing is left behind.
    """
    for name, value, allowed in (("engine", engine, ENGINES), ("form", form, FORMS), ("weights", weights, WEIGHTS)):
        if value is not None and value not in allowed:
            raise UsageError(f"{name} {value!r} is not known; choose one of {', '.join(allowed)}")
    if engine == "executorch":
        raise EngineMissing("--engine executorch is not in this version; use --engine onnx")
    if page_size not in (16, 32, 64, 128):
        raise UsageError(f"page_size {page_size} is not supported; use 16, 32, 64 or 128")
    if out.exists() and not force:
        raise UsageError(f"{out} exists; choose another --out, or replace it with --force")

    from edgekv.export.checkpoint import open_checkpoint
    from edgekv.export.onnx import count_steps, write_graphs

    if str(source) == "demo":
        with resources.as_file(resources.files("edgekv.export") / "demo_model") as folder:
            checkpoint = open_checkpoint(folder)
    else:
        checkpoint = open_checkpoint(Path(source))
    weights = weights or default_weights(checkpoint.parameters)
    total, done = count_steps(checkpoint) + 2, 0

    def step(name: str) -> None:
        nonlocal done
        progress(name, done, total)
        done += 1

    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        graphs, embedding = write_graphs(
            checkpoint, folder, form=form, weights=weights, page_size=page_size, step=step
        )
        shutil.copyfile(checkpoint.folder / "tokenizer.json", folder / "tokenizer.json")
        if checkpoint.chat_template is not None:
            (folder / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8")
        step("hashing the checkpoint")
        source_sha256 = checkpoint.sha256()
        step("hashing the bundle")
        manifest = write_manifest(
            folder,
            Manifest(
                engine=engine,
                form=form,
                weights=weights,
                page_size=page_size,
                model=checkpoint.config.model,
                graphs=graphs,
                source_sha256=source_sha256,
                tokenizer_sha256=file_sha256(folder / "tokenizer.json"),
                embedding=embedding,
                chat_template="chat_template.jinja" if checkpoint.chat_template is not None else None,
            ),
        )
        if out.exists():
            shutil.rmtree(out)
        folder.chmod(0o755)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    progress("done", total, total)
    return manifest
