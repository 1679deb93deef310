"""A plot of a run as SVG, without a plotting library: three groups of bars per figure, one per context."""

from __future__ import annotations

from html import escape

from .contestants import CONFIGURATIONS, CONTEXTS, OURS, OURS_FP16
from .results import Results

WIDTH, ROW, LABEL = 900, 16, 250
FIGURES = (
    ("decode_tok_s", "decode, tokens/s (more is better)"),
    ("prefill_tok_s", "prefill, tokens/s (more is better)"),
    ("peak_rss_mb", "peak RSS, MB (less is better)"),
)
COLOURS = {OURS: "#0b7285", OURS_FP16: "#66a5ad"}
OTHER = "#adb5bd"


def plot(results: Results) -> str:
    """Return the SVG text."""
    parts: list[str] = []
    y = 10
    for key, title in FIGURES:
        y += 24
        parts.append(f'<text x="10" y="{y}" font-size="15" font-weight="bold">{escape(title)}</text>')
        for context in CONTEXTS:
            rows = [(c.name, results.get(c.name, context, key)) for c in CONFIGURATIONS]
            measured = [(name, value) for name, value in rows if value is not None]
            if not measured:
                continue
            y += 22
            parts.append(f'<text x="10" y="{y}" font-size="12" fill="#495057">{context} tokens</text>')
            largest = max(value for _, value in measured)
            for name, value in measured:
                y += ROW
                length = (WIDTH - LABEL - 70) * value / largest
                colour = COLOURS.get(name, OTHER)
                parts.append(f'<text x="{LABEL - 8}" y="{y}" text-anchor="end" font-size="11">{escape(name)}</text>')
                parts.append(
                    f'<rect x="{LABEL}" y="{y - 10}" width="{length:.1f}" height="{ROW - 4}" fill="{colour}"/>'
                )
                parts.append(f'<text x="{LABEL + length + 6:.1f}" y="{y}" font-size="11">{value:.0f}</text>')
        y += 14
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}"'
    return "\n".join(
        [f'{head} font-family="sans-serif">', f'<rect width="{WIDTH}" height="{y}" fill="white"/>', *parts, "</svg>\n"]
    )
