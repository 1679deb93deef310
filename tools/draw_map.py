"""The picture of the folders in docs/architecture.md, drawn from the imports, with the way of a token through them.

python -m tools.draw_map            # writes docs/images/map.svg and prints what it counted
python -m tools.draw_map --check    # exit 1 if the file is not what would be drawn
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from html import escape

from .import_graph import ROOT, circles, graph, modules

PICTURE = ROOT / "docs" / "images" / "map.svg"
#: The rooms that one token of an answer passes, and what happens there; docs/architecture.md says it at length.
TOKEN_WAY = (
    ("generate", "takes the token"),
    ("decoder", "looks up its row, chooses the way of the step"),
    ("engines", "run a segment: queries, keys, values"),
    ("attention", "says which pages, and walks them"),
    ("storage", "brings what is on flash"),
    ("kernels", "attend to the pages where they lie"),
    ("pages", "take the new keys and values, seal, reclaim"),
    ("sampling", "picks the next token"),
    ("text", "prints what is certain of it"),
)
WIDTH, BOX_W, BOX_H, GAP_X, GAP_Y, LEFT, TOP = 1000, 112, 38, 14, 34, 118, 16


def room(module: str) -> str:
    """Return the room of a module: a folder or file of the runtime, a folder of edgekv, or the vocabulary at the bottom."""
    parts = module.split(".")
    if parts[0] in ("benchmarks", "tools"):
        return parts[0]
    if len(parts) > 2 and parts[1] == "runtime":
        return parts[2]
    folders = {
        "cli",
        "bench",
        "verify",
        "plan",
        "emulator",
        "serve",
        "deploy",
        "calibrate",
        "export",
        "device_profiles",
    }
    return parts[1] if len(parts) > 1 and parts[1] in folders else "vocabulary"


def rooms() -> dict[str, set[str]]:
    """Return the rooms and which others each imports."""
    edges: dict[str, set[str]] = defaultdict(set)
    for name, others in graph().items():
        if name in ("edgekv.runtime", "edgekv.__main__") or room(name) in ("benchmarks", "tools"):
            continue
        edges[room(name)] |= {room(other) for other in others if other != "edgekv.runtime"} - {room(name)}
    return {name: edges[name] for name in sorted(edges)}


def levels(edges: dict[str, set[str]]) -> dict[str, int]:
    """Return the level of each room: one above the highest that it imports."""
    found: dict[str, int] = {}

    def level(name: str) -> int:
        if name not in found:
            found[name] = 1 + max((level(other) for other in edges[name]), default=-1)
        return found[name]

    for name in edges:
        level(name)
    return found


def direct(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return the arrows that no longer way says already."""

    def below(name: str) -> set[str]:
        return edges[name] | {far for other in edges[name] for far in below(other)}

    return [
        (name, other)
        for name, others in edges.items()
        for other in sorted(others)
        if not any(other in below(between) for between in others - {other})
    ]


def draw() -> str:
    """Return the picture as SVG."""
    edges = rooms()
    level = levels(edges)
    rows: dict[int, list[str]] = defaultdict(list)
    for name in edges:
        rows[level[name]].append(name)
    height = TOP + (max(rows) + 1) * (BOX_H + GAP_Y)
    place: dict[str, tuple[float, float]] = {}
    for index, names in rows.items():
        span = len(names) * (BOX_W + GAP_X) - GAP_X
        for at, name in enumerate(names):
            place[name] = (
                (WIDTH - LEFT - span) / 2 + at * (BOX_W + GAP_X) + LEFT / 2,
                TOP + (max(rows) - index) * (BOX_H + GAP_Y),
            )
    legend = height + 10
    total = legend + 18 * len(TOKEN_WAY) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}"'
        ' font-family="system-ui, sans-serif" font-size="12.5">',
        f'<rect width="{WIDTH}" height="{total}" fill="#fff"/>',
    ]
    for name, other in direct(edges):
        (x1, y1), (x2, y2) = place[name], place[other]
        x1, x2, y1 = x1 + BOX_W / 2, x2 + BOX_W / 2, y1 + BOX_H
        middle = (y1 + y2) / 2
        curve = f"M{x1:.0f} {y1:.0f}C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"
        parts.append(f'<path d="{curve}" fill="none" stroke="#b8bec8"/>')
    outside = {"cli", "verify", "plan", "emulator", "calibrate", "export", "device_profiles", "vocabulary"}
    for name, (x, y) in place.items():
        fill = "#eef1f6" if name in outside else "#dcebff"
        parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX_W}" height="{BOX_H}" rx="6" fill="{fill}" stroke="#8a94a6"/>'
        )
        parts.append(
            f'<text x="{x + BOX_W / 2:.0f}" y="{y + 24:.0f}" text-anchor="middle" fill="#1c2430">{escape(name)}</text>'
        )
    for number, (name, what) in enumerate(TOKEN_WAY, 1):
        x, y = place[name]
        for cx, cy in ((x + 2, y + 2), (24.0, legend + 18 * (number - 1) + 8)):
            parts.append(f'<circle cx="{cx:.0f}" cy="{cy:.0f}" r="9" fill="#c2341d"/>')
            parts.append(
                f'<text x="{cx:.0f}" y="{cy + 4:.0f}" text-anchor="middle" font-size="11" fill="#fff">{number}</text>'
            )
        line = legend + 18 * (number - 1) + 12
        parts.append(
            f'<text x="40" y="{line}" fill="#1c2430"><tspan font-weight="600">{name}</tspan> {escape(what)}</text>'
        )
    parts.append(
        f'<text x="{WIDTH - 16}" y="{legend + 12}" text-anchor="end" fill="#5b6576">'
        "blue: the runtime. A line: imports what is below it.</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> int:
    """Draw, or check, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the picture is out of date")
    options = parser.parse_args()
    picture, edges = draw(), rooms()
    if options.check:
        same = PICTURE.exists() and PICTURE.read_text(encoding="utf-8") == picture
        print("the picture is up to date" if same else "docs/images/map.svg is out of date: make map")
        return 0 if same else 1
    PICTURE.write_text(picture, encoding="utf-8")
    files = graph()
    print(
        f"{len(modules())} files, {sum(map(len, files.values()))} imports between them; {len(edges)} rooms on"
        f" {max(levels(edges).values()) + 1} levels, {sum(map(len, edges.values()))} arrows,"
        f" {len(circles({name: set(others) for name, others in edges.items()}))} circles"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
