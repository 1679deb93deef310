"""Who imports whom, read from the source: lazy imports and those for types alone count like any other."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Folders of the repository that are read, and the package that each is imported as.
PACKAGES = {
    "edgekv": "edgekv",
    "runtime": "edgekv.runtime",
    "export": "edgekv.export",
    "device_profiles": "edgekv.device_profiles",
    "benchmarks": "benchmarks",
    "tools": "tools",
}


@functools.cache
def modules() -> dict[str, Path]:
    """Return every module of the repository outside tests, by its name."""
    found: dict[str, Path] = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder)
            if any((ROOT / folder / parent).is_symlink() for parent in inner.parents if parent != Path(".")):
                continue
            parts = [package, *inner.with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Return what a module imports: modules of the repository by their names, the first word of everything else too."""
    path = modules()[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{name}.{alias.name}"
                found.add(inner if inner in modules() else name)
    return frozenset(found - {module})


def graph() -> dict[str, set[str]]:
    """Return the modules of the repository and which of each other they import."""
    # What the package's own __init__ offers to users is not what its modules depend on.
    known = modules().keys() - {"edgekv"}
    return {name: {other for other in imports(name) if other in known} for name in known}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that reach each other in both directions (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(edges):
        if name not in order:
            visit(name)
    return found
