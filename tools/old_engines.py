"""Which ONNX Runtime runs which bundle: the table of docs/contract.md.

    python -m tools.old_engines [--versions 1.18.1 1.20.1 1.22.1] [--folder DIR]

Exports the bundled model in every form and weight type, installs each version into an environment of its own (under ``--folder``,
kept for the next time), and runs a step of one token and one of seven in it: a bundle runs if all of them give what the
ONNX Runtime of this environment gives with products in floats. Needs the network once per version.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
import onnx

from edgekv.bundle import read_manifest
from edgekv.contract import FORMS, WEIGHTS, GraphSpec, inline_spec, segment_spec
from edgekv.export import export_model
from edgekv.ort import onnxruntime as ort

VERSIONS = ("1.18.1", "1.20.1", "1.22.1")
#: Runs in each environment, with NumPy and ONNX Runtime alone: graph and inputs in, outputs or an error out.
STEP = """
import sys, numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 4
for line in sys.stdin.read().splitlines():
    graph, feeds, out = line.split("\\t")
    try:
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        results = session.run(names, dict(np.load(feeds)))
        np.savez(out, **dict(zip(names, results)))
    except Exception as error:
        print(str(error).splitlines()[0], flush=True)
    else:
        print("ok", flush=True)
"""
#: Root mean square of the difference over that of an output. Products with quantised weights round the activations to INT8, each
#: version in its own way: the newest is 0.032 away in the logits, 1.18 is 0.016.
TOLERANCE = 0.05


def main() -> None:
    """Print the table, and on stderr why a bundle does not run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--folder", type=Path, default=Path("bench-output/old-engines"))
    asked = parser.parse_args()
    pythons = {version: environment(asked.folder / version, version) for version in asked.versions}
    pythons[ort.__version__] = Path(sys.executable)
    print("| form | weights | " + " | ".join(pythons) + " |")
    print("|---|---|" + "---|" * len(pythons))
    with tempfile.TemporaryDirectory() as scratch:
        for form in FORMS:
            for weights in WEIGHTS:
                folder = Path(scratch) / f"{form}-{weights}"
                export_model("demo", folder, form=form, weights=weights, engine="onnx")
                cells = [verdict(folder, python, version) for version, python in pythons.items()]
                print(f"| {form} | {weights} | " + " | ".join(cells) + " |", flush=True)


def environment(folder: Path, version: str) -> Path:
    """Return the interpreter of an environment with this ONNX Runtime."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", f"onnxruntime=={version}", "numpy<2"], check=True)
    return python


def verdict(folder: Path, python: Path, version: str) -> str:
    """Say "yes" or "no"; the steps of the newest version are left beside the graphs for the others to be held against."""
    manifest = read_manifest(folder)
    specs: list[GraphSpec] = (
        [inline_spec(manifest.model, manifest.page_size)]
        if manifest.form == "inline"
        else [segment_spec(manifest.model, index) for index in range(manifest.model.n_layers + 1)]
    )
    lines, pairs = [], []
    for name, spec in zip(manifest.graphs, specs, strict=True):
        for tokens in (1, 7):
            feeds, out = folder / f"{name}-{tokens}.npz", folder / f"{name}-{tokens}-{version}.npz"
            expected = folder / f"{name}-{tokens}-expected.npz"
            if not feeds.exists():
                made = inputs(spec, tokens)
                np.savez(feeds, **made)  # type: ignore[arg-type]
                session = ort.InferenceSession(in_floats(folder / name), providers=["CPUExecutionProvider"])
                names = [output.name for output in session.get_outputs()]
                np.savez(expected, **dict(zip(names, session.run(names, made), strict=True)))
            lines.append(f"{folder / name}\t{feeds}\t{out}")
            pairs.append((expected, out))
    told = subprocess.run([python, "-c", STEP], input="\n".join(lines), text=True, capture_output=True, check=False)
    answers = told.stdout.splitlines()
    wrong = next((answer for answer in answers if answer != "ok"), None)
    if wrong is None and len(answers) == len(lines):
        wrong = next((reason for pair in pairs if (reason := difference(*pair)) is not None), None)
    elif wrong is None:
        wrong = told.stderr.strip().splitlines()[-1] if told.stderr.strip() else f"ended with {told.returncode}"
    if wrong is not None:
        print(json.dumps({"bundle": folder.name, "onnxruntime": version, "reason": wrong}), file=sys.stderr)
    return "yes" if wrong is None else "no"


def in_floats(graph: Path) -> Path:
    """Write a copy of a graph beside it that rounds no activation."""
    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    copy = graph.with_name(f"floats-{graph.name}")
    copy.write_bytes(model.SerializeToString())
    return copy


def inputs(spec: GraphSpec, tokens: int) -> dict[str, np.ndarray]:
    """Return random inputs: so many new tokens, three pages and five recent tokens."""
    rng = np.random.default_rng(0)
    sizes = {"T": tokens, "L": 1, "N": 3, "R": 5}
    made: dict[str, np.ndarray] = {}
    for tensor in spec.inputs:
        shape = [sizes[dim[0]] if isinstance(dim, str) else dim for dim in tensor.shape]
        if tensor.dtype == "int8":
            made[tensor.name] = rng.integers(-127, 128, shape).astype(np.int8)
        elif tensor.dtype == "int64":
            made[tensor.name] = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
        elif "scales" in tensor.name:
            made[tensor.name] = rng.uniform(0.001, 0.01, shape).astype(tensor.dtype)
        else:
            made[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype)
    if "position_ids" in made:
        made["position_ids"] = 200 + np.arange(tokens, dtype=np.int64)
    return made


def difference(expected: Path, found: Path) -> str | None:
    """Say which output differs by too much, if one does."""
    with np.load(expected) as theirs, np.load(found) as ours:
        for name in theirs:
            off = float(np.sqrt(np.square(theirs[name] - ours[name]).mean()))
            if not off <= TOLERANCE * max(float(np.sqrt(np.square(theirs[name]).mean())), 1e-6):
                return f"{name} differs by {off:.3g}"
    return None


if __name__ == "__main__":
    main()
