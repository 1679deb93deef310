"""A line chart as inline SVG: KLD over the position in the text, on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 44
#: Nothing below is drawn: logits of equal meaning differ by this much on two machines.
FLOOR = 1e-9


@dataclass(frozen=True)
class Line:
    """One series: points (position, mean KLD, largest KLD); ``stop``: the position after the last one."""

    name: str
    points: list[tuple[int, float, float]]
    stop: int


def line_chart(lines: list[Line], split_at: int) -> str:
    """Return the chart; a dashed line marks where tokens begin to come one by one."""
    values = [max(mean, FLOOR) for line in lines for _, mean, _ in line.points if math.isfinite(mean)]
    low = math.floor(math.log10(min(values, default=FLOOR)))
    high = max(math.ceil(math.log10(max(values, default=1.0))), low + 1)
    end = max((line.stop for line in lines), default=1)

    def x(position: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * position / end

    def y(value: float) -> float:
        share = (math.log10(max(value, FLOOR)) - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(share, 0.0), 1.0)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="KL divergence from the full fp16 cache by position">'
    ]
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>')
    for position in _ticks(end):
        label = f'<text class="tick" x="{x(position):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{position}</text>'
        parts.append(label)
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="tick" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">position in the text (tokens)</text>'
    )
    at = x(split_at)
    parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    anchor, shift = ("end", -6) if at > WIDTH * 0.7 else ("start", 6)
    parts.append(
        f'<text class="tick" x="{at + shift:.1f}" y="{TOP + 10}" text-anchor="{anchor}">one by one from here</text>'
    )
    for index, line in reversed(list(enumerate(lines))):
        parts.append(_polyline(index, line, x, y))
    return "".join(parts) + "</svg>"


def _polyline(index: int, line: Line, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    stops = [point[0] for point in line.points[1:]] + [line.stop]
    centres = [((start + stop) / 2, mean, most) for (start, mean, most), stop in zip(line.points, stops, strict=True)]
    finite = [(at, mean, most) for at, mean, most in centres if math.isfinite(mean)]
    path = " ".join(f"{x(at):.1f},{y(mean):.1f}" for at, mean, _ in finite)
    dots = "".join(
        f'<circle class="s{index}" cx="{x(at):.1f}" cy="{y(mean):.1f}" r="3"><title>{escape(line.name)}, about token {at:.0f}:'
        f" mean {mean:.2e}, largest {most:.2e}</title></circle>"
        for at, mean, most in finite
    )
    return f'<polyline class="s{index}" points="{path}"/>{dots}'


def _ticks(end: int) -> list[int]:
    step = 10 ** max(0, math.floor(math.log10(max(end, 1))) - 1)
    while end / step > 9:
        step *= 2 if end / step <= 18 else 5 if end / step <= 45 else 10
    return list(range(0, end + 1, step))
