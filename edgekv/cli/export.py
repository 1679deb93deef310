"""`edgekv export`: a Hugging Face checkpoint becomes a bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from edgekv import settings
from edgekv.contract import STORED
from edgekv.errors import EdgeKVError, GateFailed
from edgekv.exported_weights import EXPORTED_WEIGHTS
from edgekv.model_config import TEXT_PARTS
from edgekv.sizes import format_bytes

from .options import argument, option
from .output import print_json, stderr

if TYPE_CHECKING:
    from edgekv.verify.source import SourceVerdict


def export_command(
    source: Annotated[
        str,
        argument(
            settings.WORD,
            "SOURCE",
            help="A Hugging Face checkpoint folder, a GGUF file, the name of one on the Hugging Face hub, or `demo` for the"
            " bundled model.",
        ),
    ],
    out: Annotated[
        Path, option(settings.FILE, "--out", "-o", help="The bundle's folder; it appears whole or not at all.")
    ],
    target: Annotated[
        str | None,
        option(
            settings.PROFILE,
            "--target",
            help="The device that the bundle is for, if not machines like this one; see `edgekv profiles`. Its processor chooses"
            " engine and operators, its memory the weights.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        option(
            settings.ENGINE,
            "--engine",
            help="What will run it. Default: the one that was measured faster on machines like this one.",
        ),
    ] = None,
    form: Annotated[
        str,
        option(
            settings.FORM,
            "--form",
            help="split: fast, for `edgekv run`. inline: one graph that any ONNX Runtime runs without our code.",
        ),
    ] = "split",
    weights: Annotated[
        str | None,
        option(
            EXPORTED_WEIGHTS,
            "--weights",
            help="How weights are stored. stored: as a quantised source has them, without rounding again, the default for one"
            " (GGUF). mixed:N: int4, and int8 where it was measured to be worth most, within N bits a weight, scales counted."
            " Else the default is int4 from 100 million parameters on, fp32 below.",
        ),
    ] = None,
    operators: Annotated[
        str | None,
        option(
            settings.OPERATORS_OF,
            "--operators",
            help="What an ExecuTorch program computes with. xnnpack: runs everywhere, also in apps of your own. edgekv:"
            " int4 only, on our native kernels; faster on x86-64 with AVX-512 VNNI, slow on x86-64 without it.",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        option(
            settings.WORD,
            "--calibration",
            metavar="none|FILE",
            help="A text like those that the model will read: int4 weights are rounded for it. none: each to the nearest"
            " code, which is quicker and worse. Default: 75 kB of two novels.",
        ),
    ] = None,
    io: Annotated[
        str | None,
        option(
            settings.IO_OF,
            "--io",
            help="The inline form's cache inputs. compact: scales and recent tokens as float16. portable: as float32, for"
            " bindings that know no float16, such as Swift's.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        option(
            settings.CONTEXT,
            "--context",
            help="The most tokens of a text. Default: what the model was made for. Phi-3 and Phi-4-mini need it where they have"
            " longrope: one set of factors is for texts up to the original context, another for longer ones.",
        ),
    ] = None,
    page_size: Annotated[
        int, option(settings.PAGE_SIZE, "--page-size", metavar="16|32|64|128", help="Tokens per page of the KV cache.")
    ] = 32,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Read 640 tokens with the bundle and with the checkpoint, and say what the weights cost; exit code 1 beyond"
            " perplexity +3 % or a KL divergence of 0.05. `edgekv verify --reference` says more.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON on stdout.")] = False,
) -> None:
    """Export a checkpoint to a bundle that `edgekv run` reads.

    Examples:
    `edgekv export demo --out demo.edgekv`

    `edgekv export ./Llama-3.2-1B --out llama.edgekv`

    `edgekv export Qwen/Qwen3-0.6B --out qwen.edgekv`   downloads it; also OWNER/NAME@REVISION and OWNER/NAME/FILE.gguf

    `edgekv export ./Qwen3-0.6B --out qwen.edgekv --weights int8 --form inline`

    `edgekv export ./SmolLM2-135M-Instruct.Q4_K_M.gguf --out smollm.edgekv`   with the weights that the file has

    `edgekv export ./Llama-3.2-1B --out llama.edgekv --target raspberry-pi-5-8gb`

    `edgekv export ./Qwen3-0.6B --out qwen.edgekv --engine onnx`   for a device where only ONNX Runtime is installed
    """
    from edgekv.device_profiles import load
    from edgekv.device_profiles.geometry import Geometry
    from edgekv.export import export_model
    from edgekv.export.choose_engine import default_engine, slow_on
    from edgekv.export.hub import fetch_source
    from edgekv.export.target import choose_for

    console = stderr()
    device = load(target) if target is not None else None
    start = time.perf_counter()
    checkpoint = fetch_source(source)  # the hub's library draws a bar of its own
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading the checkpoint", total=None)
        unlike: dict[str, object] = {}
        manifest = export_model(
            checkpoint,
            out,
            engine=engine,
            form=form,
            weights=weights,
            page_size=page_size,
            operators=operators,
            io=io,
            context=context,
            calibration=calibration,
            force=force,
            target=device,
            progress=lambda step, done, total: bar.update(task, description=step, completed=done, total=total),
            opened=lambda opened: unlike.update(opened.not_applied),
        )
        verdict = _check(out, checkpoint, bar) if check else None
    machine = device.processor if device is not None else None
    warning = slow_on(manifest.engine, form, manifest.weights, manifest.operators, machine)
    if as_json:
        found = {} if verdict is None else {"check": _check_facts(verdict)}
        print_json({**manifest.to_json(), "slow_on": warning, "not_applied": unlike, **found})
        _hold(verdict)
        return
    model = manifest.model
    size_bytes = sum(entry["bytes"] for entry in manifest.files.values())
    kept = manifest.source_codes == "kept"
    chosen = manifest.weights
    if kept:
        chosen += f" as {checkpoint.name} has them" + (" (--weights decides)" if weights is None else "")
    elif weights is None and device is None:
        chosen += " (chosen by size; --weights decides)"
    console.print(
        escape(
            f"{out}: {model.architecture}, {model.n_layers} layers, weights {chosen}, {manifest.engine} {manifest.form},"
            f" pages of {page_size} tokens, {format_bytes(size_bytes)}, {time.perf_counter() - start:.1f} s"
        ),
        soft_wrap=True,
        highlight=False,
    )
    if model.architecture in TEXT_PARTS:
        line = f"{model.architecture}: text alone; what reads images is not in the bundle"
        console.print(line, soft_wrap=True, highlight=False)
    if manifest.source_codes == "rounded":
        line = f"{checkpoint.name} is quantised, and its weights were rounded anew; --engine onnx --weights {STORED} keeps them"
        console.print(escape(line), soft_wrap=True, highlight=False)
    if device is not None and kept:
        line = f"for {device.name} ({device.processor}): {manifest.engine}, which computes with weights as they are"
        console.print(escape(line), soft_wrap=True, highlight=False)
    elif device is not None:
        geometry = Geometry.from_model(manifest.model)
        reason = choose_for(device, geometry, form, engine=engine, operators=operators, weights=weights).reason
        console.print(escape(reason), soft_wrap=True, highlight=False)
    elif engine is None and not kept:
        reason = default_engine(form, manifest.weights).reason
        console.print(escape(f"{manifest.engine}: {reason} (--engine decides)"), soft_wrap=True, highlight=False)
    if unlike:
        settings = ", ".join(f"{name}={value}" for name, value in unlike.items())
        asks = checkpoint.name if checkpoint.is_file() else "generation_config.json"
        line = f"{asks} asks for {settings[:200]}, which edgekv does not do: answers are made without"
        console.print(escape(line), soft_wrap=True, highlight=False)
    if warning is not None:
        console.print(escape(f"{manifest.engine}: {warning}"), soft_wrap=True, highlight=False)
    if verdict is not None:
        part = verdict.all
        console.print(
            f"check: perplexity {part.perplexity_change:+.1%} against the checkpoint in float, mean KLD {part.mean_kld:.3f}, the"
            f" same most likely token {part.top1:.0%} of the time ({part.tokens} tokens)",
            soft_wrap=True,
            highlight=False,
        )
    _hold(verdict)


def _check(bundle: Path, source: Path, bar: Progress) -> SourceVerdict:
    """Compare a bundle's weights with its checkpoint, with the cache in fp16."""
    from edgekv.runtime.generate import RunOptions
    from edgekv.tiers import KVMode
    from edgekv.verify.gate import load_gate
    from edgekv.verify.judge import QUICK
    from edgekv.verify.source import verify_source

    tasks: dict[str, TaskID] = {}

    def advance(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            tasks[phase] = bar.add_task(phase, total=total)
        bar.update(tasks[phase], completed=done)

    options = RunOptions(kv=KVMode.FP16, own_process=True)
    try:
        return verify_source(bundle, source, options, load_gate("weights"), QUICK, advance=advance)
    except EdgeKVError as error:
        raise EdgeKVError(f"the bundle is there, but it cannot be checked: {error}") from error


def _check_facts(verdict: SourceVerdict) -> dict[str, object]:
    from edgekv.verify.report import source_to_json

    return source_to_json(verdict)


def _hold(verdict: SourceVerdict | None) -> None:
    if verdict is not None and not verdict.passed:
        from edgekv.verify.report import failures

        raise GateFailed(f"the bundle is there, but {failures(verdict)}")
