"""Who may import whom: from low to high, in no circle. `export` and `runtime` never meet, and the device never sees torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools.draw_map import PICTURE, draw
from tools.import_graph import ROOT, circles, graph, imports, modules

#: From low to high; each may import what stands before it.
FLOORS = (
    ("edgekv.errors", "edgekv.host", "edgekv.tiers", "edgekv.sizes", "edgekv.spec", "edgekv.codec", "edgekv.seam",
     "edgekv.contract", "edgekv.bundle", "edgekv.jail", "edgekv.model_config", "edgekv.schema", "edgekv.files",
     "edgekv.scratch", "edgekv.settings", "edgekv.exported_weights", "edgekv.logs", "edgekv.ort"),
    ("edgekv.device_profiles",),
    ("edgekv.runtime", "edgekv.export"),
    ("edgekv.verify", "edgekv.plan", "edgekv.emulator", "edgekv.bench", "edgekv.serve", "edgekv.deploy"),
    ("edgekv.calibrate",),
    ("edgekv.cli", "edgekv.__main__"),
    ("benchmarks", "tools"),
)  # fmt: skip
#: The rooms of the runtime, from low to high; each may import what stands before it.
ROOMS = (
    "system", "kernels", "build", "meter", "engines", "storage", "options", "pages", "machine", "attention", "sessions",
    "decoder", "governor", "keeper", "stats", "turns", "prepare", "sequence", "chat_template", "text", "sampling", "chat",
    "generate", "add_prefix", "memory_manager", "serving",
)  # fmt: skip


def within(name: str, package: str) -> bool:
    return name == package or (package != "edgekv" and name.startswith(package + "."))


def floor(name: str) -> int:
    fitting = [(len(package), index) for index, row in enumerate(FLOORS) for package in row if within(name, package)]
    assert fitting, f"{name} stands on no floor: put it into FLOORS"
    return max(fitting)[1]


def test_no_module_imports_from_a_higher_floor() -> None:
    upward = [
        f"{name} imports {other}" for name, others in graph().items() for other in others if floor(other) > floor(name)
    ]
    assert upward == []


def test_inside_the_runtime_data_flows_one_way() -> None:
    def room(name: str) -> int:
        return ROOMS.index(name.split(".")[2])

    rooms = {name: others for name, others in graph().items() if name.startswith("edgekv.runtime.")}
    upward = [
        f"{name} imports {other}"
        for name, others in rooms.items()
        for other in others
        if other.startswith("edgekv.runtime.") and room(other) > room(name)
    ]
    assert upward == []


def test_there_is_no_circle_of_imports_anywhere() -> None:
    assert circles(graph()) == []


def test_export_and_runtime_never_import_each_other() -> None:
    def crossing(one: str, two: str) -> list[str]:
        return [
            f"{name} imports {other}"
            for name, others in graph().items()
            if within(name, one)
            for other in others
            if within(other, two)
        ]

    assert crossing("edgekv.runtime", "edgekv.export") + crossing("edgekv.export", "edgekv.runtime") == []


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("edgekv.runtime", {"torch", "transformers", "onnx"}),
        ("edgekv.verify", {"torch", "transformers", "onnx", "onnxruntime"}),
        ("edgekv.plan", {"torch", "transformers", "onnx", "onnxruntime"}),
        ("edgekv.emulator", {"torch", "transformers", "onnx", "onnxruntime"}),
        ("edgekv.bench", {"torch", "transformers", "onnx", "onnxruntime"}),
        ("edgekv.serve", {"torch", "transformers", "onnx", "onnxruntime"}),
        ("edgekv.deploy", {"torch", "transformers", "onnx", "onnxruntime"}),
        ("edgekv.runtime", {"fastapi", "starlette", "pydantic", "uvicorn"}),
        ("edgekv.calibrate", {"torch", "transformers", "onnx"}),
        ("edgekv.export", {"transformers"}),
        ("edgekv.device_profiles", {"numpy", "torch"}),
    ],
)
def test_a_folder_imports_no_package_that_it_must_not(package: str, forbidden: set[str]) -> None:
    offenders = [
        f"{name} imports {other}"
        for name in modules()
        if within(name, package)
        for other in imports(name)
        if other.split(".")[0] in forbidden
    ]
    assert offenders == []


def test_neighbours_import_each_other_relatively() -> None:
    absolute = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for name, path in modules().items()
        for package in ("edgekv.runtime", "edgekv.export", "edgekv.device_profiles")
        if within(name, package)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.strip().startswith((f"from {package} ", f"from {package}."))
    ]
    assert absolute == []


def test_importing_edgekv_loads_neither_torch_nor_an_engine() -> None:
    engines = ("torch", "onnxruntime", "onnx")
    code = f"import sys, edgekv.runtime.memory_manager; print([m for m in {engines} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_no_file_is_longer_than_one_job_needs() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {lines}"
        for folder in ("edgekv", "export", "runtime", "device_profiles", "tools", "benchmarks", "examples", "tests")
        for pattern in ("*.py", "*.cpp", "*.h")
        for path in sorted((ROOT / folder).rglob(pattern))
        if not path.is_symlink() and (lines := len(path.read_text(encoding="utf-8").splitlines())) > 600
    ]
    assert long == []


def test_the_picture_in_the_architecture_is_drawn_from_the_imports() -> None:
    assert PICTURE.read_text(encoding="utf-8") == draw(), "imports changed: make map"
