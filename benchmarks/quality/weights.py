"""What each weight type costs a model: bundles of one checkpoint against it, in float.

    python -m benchmarks.quality.weights demo --tokens 4096
    python -m benchmarks.quality.weights ./SmolLM2-135M-Instruct --tokens 2048 --only onnx --weights int4 mixed:6

A row per bundle: bits per weight over all matrices that products read, scales and zero points included, then on flash (files over
parameters, so graphs and tokenizer count), and what `edgekv verify --reference` measures with a cache in fp16.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from edgekv.bundle import Manifest
from edgekv.export import export_model
from edgekv.export.open_source import opened_source
from edgekv.runtime.generate import RunOptions
from edgekv.tiers import KVMode
from edgekv.verify.gate import load_gate
from edgekv.verify.judge import Settings
from edgekv.verify.source import verify_source

#: Engines, and the operators of theirs that are measured.
ENGINES = (("onnx", None), ("executorch", "xnnpack"))
#: Engine, weights, calibration, operators.
BUNDLES = (
    ("onnx", "int8", None, None),
    ("onnx", "mixed:7", None, None),
    ("onnx", "mixed:6", None, None),
    ("onnx", "int4", None, None),
    ("onnx", "int4", "none", None),
    ("executorch", "int8", None, "xnnpack"),
    ("executorch", "int4", None, "xnnpack"),
    ("executorch", "int4", "none", "xnnpack"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="as in `edgekv export`")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text")
    parser.add_argument("--decode", type=int, default=64, help="of these, so many one by one")
    parser.add_argument(
        "--only", choices=("onnx", "executorch"), help="bundles of this engine; ExecuTorch's are slow to make"
    )
    parser.add_argument("--weights", nargs="+", help="as in `edgekv export`; default: a table of them")
    parser.add_argument("--calibration", help="as in `edgekv export`; default: with its own text, and without")
    arguments = parser.parse_args()
    print(
        "| weights | s to export | bits, all matrices | on flash | perplexity | mean KLD | top-1 |\n|---|---|---|---|---|---|---|"
    )
    bundles = BUNDLES
    if arguments.weights:
        bundles = tuple(
            (engine, weights, arguments.calibration, operators)
            for engine, operators in ENGINES
            for weights in arguments.weights
        )
    for engine, weights, calibration, operators in bundles:
        if arguments.only in (None, engine):
            print(row(arguments, engine, weights, calibration, operators), flush=True)


def row(
    arguments: argparse.Namespace, engine: str, weights: str, calibration: str | None, operators: str | None
) -> str:
    """Export a bundle, measure it, and return its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        manifest = export_model(
            arguments.source, out := Path(folder) / "bundle", engine=engine, weights=weights, calibration=calibration,
            operators=operators,
        )  # fmt: skip
        seconds = time.monotonic() - started
        part = verify_source(
            out, arguments.source, RunOptions(kv=KVMode.FP16), load_gate("weights"),
            Settings(tokens=arguments.tokens, decode=arguments.decode),
        ).all  # fmt: skip
    with opened_source(arguments.source) as checkpoint:
        flash = 8 * sum(facts["bytes"] for facts in manifest.files.values()) / checkpoint.parameters
    name = ", ".join(
        [
            weights,
            *(["XNNPACK"] if engine == "executorch" else []),
            *(["each to the nearest code"] if calibration == "none" else []),
        ]
    )
    found = [
        name, f"{seconds:.0f}", bits_of_matrices(manifest), f"{flash:.2f}",
        f"{part.perplexity_change:+.1%}", f"{part.mean_kld:.4f}", f"{part.top1:.1%}",
    ]  # fmt: skip
    return f"| {' | '.join(found)} |"


def bits_of_matrices(manifest: Manifest) -> str:
    """Return the bits a weight of what products read; nothing where the manifest does not say."""
    kinds = manifest.matrices_by_kind().values()
    weights = sum(facts["weights"] for facts in kinds)
    return f"{8 * sum(facts['bytes'] for facts in kinds) / weights:.2f}" if weights else ""


if __name__ == "__main__":
    main()
