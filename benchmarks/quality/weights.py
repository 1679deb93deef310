"""What each weight type costs a model: bundles of one checkpoint against it, in float.

    python -m benchmarks.quality.weights demo --tokens 4096
    python -m benchmarks.quality.weights ./SmolLM2-135M-Instruct --tokens 2048 --onnx-only

A row per bundle: bits per weight in memory and on flash (files over parameters, so graphs and tokenizer count), and what
`edgekv verify --reference` measures with a cache in fp16.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from edgekv.export import export_model
from edgekv.export.open_source import opened_source
from edgekv.runtime.generate import RunOptions
from edgekv.tiers import KVMode
from edgekv.verify.gate import load_gate
from edgekv.verify.judge import Settings
from edgekv.verify.source import verify_source

#: Name, engine, weights, calibration, operators.
BUNDLES = (
    ("int8", "onnx", "int8", None, None),
    ("int4", "onnx", "int4", None, None),
    ("int4, each to the nearest code", "onnx", "int4", "none", None),
    ("int8, XNNPACK", "executorch", "int8", None, "xnnpack"),
    ("int4, XNNPACK", "executorch", "int4", None, "xnnpack"),
    ("int4, XNNPACK, each to the nearest code", "executorch", "int4", "none", "xnnpack"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="as in `edgekv export`")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text")
    parser.add_argument("--onnx-only", action="store_true", help="leave out the bundles of ExecuTorch, slow to make")
    arguments = parser.parse_args()
    with opened_source(arguments.source) as checkpoint:
        parameters = checkpoint.parameters
    print("| weights | bits in memory | on flash | perplexity | mean KLD | top-1 |\n|---|---|---|---|---|---|")
    for name, engine, weights, calibration, operators in BUNDLES:
        if arguments.onnx_only and engine != "onnx":
            continue
        with tempfile.TemporaryDirectory() as folder:
            manifest = export_model(
                arguments.source, out := Path(folder) / "bundle", engine=engine, weights=weights, calibration=calibration,
                operators=operators,
            )  # fmt: skip
            found = verify_source(
                out, arguments.source, RunOptions(kv=KVMode.FP16), load_gate("weights"),
                Settings(tokens=arguments.tokens, decode=64),
            )  # fmt: skip
        flash = sum(facts["bytes"] for facts in manifest.files.values())
        bits = [f"{8 * size / parameters:.1f}" for size in (manifest.weights_bytes(), flash)]
        part = found.all
        print(
            f"| {name} | {' | '.join(bits)} | {part.perplexity_change:+.1%} | {part.mean_kld:.4f} | {part.top1:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
