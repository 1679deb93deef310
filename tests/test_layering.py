"""Who may import whom. `export` and `runtime` never meet, and the device side never sees torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BOTTOM = {
    "edgekv.errors",
    "edgekv.schema",
    "edgekv.types",
    "edgekv.spec",
    "edgekv.model_config",
    "edgekv.codec",
    "edgekv.seam",
    "edgekv.contract",
    "edgekv.bundle",
}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def offenders(folder: str, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in sorted(imports(path))
        if any(name == bad or name.startswith(bad + ".") for bad in forbidden)
    ]


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        (
            "runtime",
            ("torch", "transformers", "onnx", "edgekv.export", "edgekv.verify", "edgekv.emulator", "edgekv.cli"),
        ),
        ("edgekv/verify", ("torch", "transformers", "onnx", "onnxruntime", "edgekv.export", "edgekv.cli")),
        ("edgekv/plan", ("torch", "transformers", "onnx", "onnxruntime", "edgekv.export", "edgekv.cli")),
        (
            "edgekv/emulator",
            ("torch", "transformers", "onnx", "onnxruntime", "edgekv.export", "edgekv.verify", "edgekv.cli"),
        ),
        ("edgekv/calibrate", ("torch", "transformers", "onnx", "edgekv.export", "edgekv.cli")),
        ("export", ("edgekv.runtime", "edgekv.cli", "transformers")),
        ("device_profiles", ("edgekv.runtime", "edgekv.export", "edgekv.cli", "numpy", "torch")),
    ],
)
def test_a_folder_imports_nothing_that_it_must_not(folder: str, forbidden: tuple[str, ...]) -> None:
    assert offenders(folder, forbidden) == []


def test_the_shared_vocabulary_stands_on_nothing_else() -> None:
    for module in sorted(BOTTOM):
        stem = ROOT / module.replace(".", "/")
        files = sorted(stem.glob("*.py")) if stem.is_dir() else [stem.with_suffix(".py")]
        inner = {name for path in files for name in imports(path) if name.startswith("edgekv.")}
        assert all(any(name == low or name.startswith(low + ".") for low in BOTTOM) for name in inner), (module, inner)


def test_importing_edgekv_loads_neither_torch_nor_an_engine() -> None:
    code = "import sys, edgekv, edgekv.runtime.manager; print([m for m in ('torch', 'onnxruntime', 'onnx') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_no_file_is_longer_than_one_job_needs() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {lines}"
        for folder in ("edgekv", "export", "runtime", "device_profiles", "tools", "benchmarks", "examples", "tests")
        for pattern in ("*.py", "*.cpp", "*.h")
        for path in sorted((ROOT / folder).rglob(pattern))
        if not path.is_symlink() and (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    ]
    assert long == []
