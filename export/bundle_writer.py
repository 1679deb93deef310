"""The whole export: checkpoint in, bundle out, nothing half-written left behind."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekv.bundle import MANIFEST, TOKENIZER, Manifest, file_sha256, write_manifest
from edgekv.contract import ENGINES, FORMS, IO, LEAST_ONNXRUNTIME, OPERATORS, STORED, default_weights
from edgekv.device_profiles import DeviceProfile
from edgekv.device_profiles.geometry import Geometry
from edgekv.errors import BudgetError, EdgeKVError, UsageError
from edgekv.exported_weights import EXPORTED_WEIGHTS
from edgekv.host import machine_class
from edgekv.scratch import HIDDEN, ScratchFolder, remove_abandoned

from .choose_engine import default_engine
from .matrix_kinds import MatrixKinds, choose_kinds
from .open_source import missing, opened_source
from .target import choose_for, processor_of

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .rounding import Calibration
    from .written import Written

CHAT_TEMPLATE = "chat_template.jinja"
Progress = Callable[[str, int, int], None]


def export_model(
    source: str | Path,
    out: Path,
    *,
    engine: str | None = None,
    form: str = "split",
    weights: str | None = None,
    page_size: int = 32,
    operators: str | None = None,
    calibration: str | Path | None = None,
    io: str | None = None,
    context: int | None = None,
    force: bool = False,
    target: DeviceProfile | None = None,
    progress: Progress = lambda step, done, total: None,
    opened: Callable[[Checkpoint], None] = lambda checkpoint: None,
) -> Manifest:
    """Export a checkpoint to a bundle.

    Args:
        source: a Hugging Face checkpoint folder, a GGUF file, the name of one on the hub (see :mod:`edgekv.export.hub`), or
            ``demo`` for the bundled model.
        out: the bundle's folder; it appears whole or not at all.
        engine: one of :data:`edgekv.contract.ENGINES`; None: see :func:`edgekv.export.choose_engine.default_engine`.
        weights: one of :data:`edgekv.contract.WEIGHTS`, or STORED: as a quantised source has them, or ``mixed:N``: int4, and int8
            where it was measured to be worth most, within N bits a weight. None: STORED where that is possible
            (``source_codes`` of the manifest tells), else by size, see :func:`edgekv.contract.default_weights`.
        operators: what an ExecuTorch program computes with, one of :data:`edgekv.contract.OPERATORS`; None: XNNPACK,
            or what was measured faster where the engine was chosen by measurement.
        calibration: the text that int4 weights are rounded with, ``none`` to round each to the nearest
            code; None takes the one that comes with edgekv. See :mod:`edgekv.export.rounding`.
        io: one of :data:`edgekv.contract.IO`, for the inline form; None: compact.
        context: the most tokens of a text; None: as many as the model was made for. Models with longrope need it.
        force: replace ``out`` if it exists.
        target: the device that the bundle is for; None: machines like this one. See :mod:`edgekv.export.target`.
        progress: called before each step with its name, the number of steps done, and of all steps.
        opened: called with the checkpoint, before anything else is done with it.

    Raises:
        CheckpointError: the checkpoint cannot be exported. UsageError: an option is not known, or ``out`` exists.
        BudgetError: the weights leave the target no memory for keys and values. EngineMissing: a package that exporting needs
        is not installed. EdgeKVError: ``out`` cannot be written.
        Nothing is left behind in any case.
    """
    for name, value, allowed in (
        ("engine", engine, ENGINES),
        ("form", form, FORMS),
        ("operators", operators, OPERATORS),
        ("io", io, IO),
    ):
        if value is not None and value not in allowed:
            raise UsageError(f"{name} {value!r} is not known; choose one of {', '.join(allowed)}")
    weights = EXPORTED_WEIGHTS.optional(weights)
    if operators is not None and engine == "onnx":
        raise UsageError("--operators is for --engine executorch")
    if io is not None and (form != "inline" or engine == "executorch"):
        raise UsageError("--io is for --form inline with --engine onnx: it chooses the types of the cache's inputs")
    if context is not None and context < 1:
        raise UsageError(f"context {context} is not a number of tokens")
    if page_size not in (16, 32, 64, 128):
        raise UsageError(f"page_size {page_size} is not supported; use 16, 32, 64 or 128")
    if target is not None:
        processor_of(target)
    remove_abandoned(out.parent, HIDDEN)  # before anything is asked of ``out``: it may come back
    if out.exists() and not force:
        raise UsageError(f"{out} exists; choose another --out, or replace it with --force")
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not a bundle; --force replaces bundles only, choose another --out")

    with contextlib.ExitStack() as stack:
        stack.enter_context(_rare_collections())
        checkpoint = stack.enter_context(opened_source(source, context))
        opened(checkpoint)
        try:
            choice = Choice(engine, form, weights, page_size, operators, calibration, io or IO[0], target)
            return _export(checkpoint, out, choice, _Steps(progress))
        except ImportError as error:
            raise missing(error) from error
        except OSError as error:
            reason = error.strerror or error
            raise EdgeKVError(f"cannot write {out}: {reason}; free the disk or choose another --out") from error


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Look for garbage seldom: importing torch and tracing a model make millions of objects that live to the end.

    Going through all of them time and again took nine tenths of an export's time on a machine whose memory is slow.
    """
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@dataclass(frozen=True)
class Choice:
    """What the caller asked for; ``weights`` None: as stored, or by size; ``engine`` None: by measurement."""

    engine: str | None
    form: str
    weights: str | None
    page_size: int
    operators: str | None
    calibration: str | Path | None
    io: str
    target: DeviceProfile | None


class _Steps:
    """Counts steps for a progress callback."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.done, self.total = progress, 0, 1

    def __call__(self, name: str) -> None:
        self.progress(name, self.done, self.total)
        self.done += 1


def _export(checkpoint: Checkpoint, out: Path, choice: Choice, steps: _Steps) -> Manifest:
    decision = _decide(checkpoint, choice, steps)
    engine, operators, kinds = decision.engine, decision.operators, decision.kinds
    calibration = _calibration(choice.calibration, kinds)
    write: Callable[..., Written]
    if engine == "executorch":
        from .executorch import split as executorch

        operators = operators or "xnnpack"
        count = executorch.count_steps(checkpoint)
        write = functools.partial(executorch.write_graphs, checkpoint, calibration=calibration, operators=operators)
    else:
        from .onnx import graphs as onnx

        count = onnx.count_steps(checkpoint)
        write = functools.partial(onnx.write_graphs, checkpoint, calibration=calibration, io=choice.io)

    steps.total = steps.done + count + 2
    steps("checking the checkpoint")
    source_sha256 = checkpoint.sha256()
    with _appearing(out) as folder:
        written = write(folder, form=choice.form, kinds=kinds, page_size=choice.page_size, step=steps)
        tokenizer = checkpoint.tokenizer
        model = checkpoint.config.model
        (folder / TOKENIZER).write_text(tokenizer.json, encoding="utf-8")
        if tokenizer.chat_template is not None:
            (folder / CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
        prompt_begin, prompt_end = tokenizer.frame()
        steps("hashing the bundle")
        manifest = Manifest(
            engine=engine,
            form=choice.form,
            weights=kinds.most,
            page_size=choice.page_size,
            model=model,
            graphs=written.graphs,
            source_sha256=source_sha256,
            tokenizer_sha256=file_sha256(folder / TOKENIZER),
            embedding=written.embedding,
            chat_template=CHAT_TEMPLATE if tokenizer.chat_template is not None else None,
            special_tokens=dict(tokenizer.special_tokens),
            bos_token=None if model.bos_token_id is None else tokenizer.spell([model.bos_token_id])[0],
            eos_tokens=tokenizer.spell(model.eos_token_ids),
            prompt_begin=prompt_begin,
            prompt_end=prompt_end,
            operators=operators,
            io=choice.io,
            sampling=checkpoint.sampling,
            matrices=written.matrices,
            least_onnxruntime=_least_onnxruntime(written) if engine == "onnx" else None,
            source_codes=None if not checkpoint.quantised else "kept" if kinds.stored else "rounded",
            made_for=decision.made_for,
        )
        manifest = write_manifest(folder, manifest)
    steps.progress("done", steps.total, steps.total)
    return manifest


@dataclass(frozen=True)
class _Decision:
    """What a bundle is made of. ``made_for``: the class of machines for which engine and operators were chosen, if they were."""

    engine: str
    operators: str | None
    kinds: MatrixKinds
    made_for: str | None


def _decide(checkpoint: Checkpoint, choice: Choice, steps: _Steps) -> _Decision:
    """Choose what was left open: codes stay what they are where that is possible, what is in floats is stored by its size."""
    bits = EXPORTED_WEIGHTS.mixed_bits(choice.weights or "")
    if bits is not None:
        return _Decision("onnx", None, _mixed(checkpoint, choice, bits, steps), None)
    geometry = Geometry.from_model(checkpoint.config.model)
    processor = None if choice.target is None else choice.target.processor
    executorch = choice.engine == "executorch" or choice.operators is not None
    if choice.weights == STORED and executorch:
        raise UsageError(
            f"--weights {STORED} is for --engine onnx: ExecuTorch's products know no such scales; choose int4 or int8, which"
            " round the weights anew"
        )
    if choice.weights == STORED or (choice.weights is None and checkpoint.quantised and not executorch):
        kinds = choose_kinds(checkpoint, STORED)
        try:
            if choice.target is not None:
                choose_for(choice.target, geometry, choice.form, engine="onnx", weights=kinds.most)
            return _Decision("onnx", None, kinds, processor)
        except BudgetError:
            if choice.weights == STORED:
                raise  # otherwise, what fits
    weights = choice.weights or default_weights(checkpoint.parameters)
    if choice.target is not None:
        found = choose_for(
            choice.target,
            geometry,
            choice.form,
            engine=choice.engine,
            operators=choice.operators,
            weights=choice.weights,
        )
        kinds = choose_kinds(checkpoint, found.weights)
        return _Decision(found.engine, found.operators, kinds, processor)
    kinds = choose_kinds(checkpoint, weights)
    if choice.engine is not None:
        return _Decision(choice.engine, choice.operators, kinds, None)
    if choice.operators is not None:
        return _Decision("executorch", choice.operators, kinds, None)
    default = default_engine(choice.form, weights)
    return _Decision(default.engine, default.operators, kinds, machine_class())


def _mixed(checkpoint: Checkpoint, choice: Choice, bits: float, steps: _Steps) -> MatrixKinds:
    from .mixed import mixed_kinds

    if choice.target is not None or choice.operators is not None or choice.engine == "executorch":
        raise UsageError(
            f"--weights {choice.weights} is for --engine onnx without --target: matrices of other bundles are of one kind"
        )
    calibration = _calibration(choice.calibration, MatrixKinds("int4"))
    if calibration is None:
        raise UsageError(f"--weights {choice.weights} measures on a calibration text; leave --calibration none out")
    steps("measuring what products lose in int4")
    return mixed_kinds(checkpoint, bits, calibration)


def _calibration(asked: str | Path | None, kinds: MatrixKinds) -> Calibration | None:
    from .rounding import read_calibration

    if asked == "none":
        return None
    if kinds.stored:
        if asked is not None:
            raise UsageError(
                f"--calibration is for weights that are rounded, and --weights {STORED} keeps them; leave it out"
            )
        return None
    if kinds.most == "int4":
        return read_calibration(None if asked is None else Path(asked))
    if asked is not None:
        raise UsageError(f"--calibration is for int4 weights, and these are {kinds.most}; leave it out")
    return None


def _least_onnxruntime(written: Written) -> str:
    kinds = {kind for matrices in written.matrices.values() for kind in matrices}
    return max((LEAST_ONNXRUNTIME[kind] for kind in kinds), key=lambda version: [*map(int, version.split("."))])


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Give a folder beside ``out`` that takes its place at the end, and is removed however the export ends."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with ScratchFolder(out.parent, HIDDEN) as scratch:
        folder = scratch.path / out.name
        folder.mkdir()
        yield folder
        scratch.put(folder, out)
