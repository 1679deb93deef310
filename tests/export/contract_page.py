"""The tables of docs/contract.md, made from edgekv.contract. `python -m tests.export.contract_page` writes them."""

from __future__ import annotations

import re
from pathlib import Path

from edgekv.contract import GraphSpec, TensorSpec, inline_spec, segment_spec
from edgekv.spec import ModelSpec, RopeSpec
from tests.fields import put_tables

PAGE = Path(__file__).resolve().parents[2] / "docs" / "contract.md"
PAGE_SIZE = 48
#: A geometry of unlikely numbers, so that each can be printed by its name.
NAMES = {
    770: "hidden",
    14: "n_q_heads",
    7: "n_kv_heads",
    52: "head_dim",
    26: "rotary_dim/2",
    5003: "vocab",
    PAGE_SIZE: "page_size",
}
MODEL = ModelSpec(
    architecture="",
    n_layers=3,
    hidden_size=770,
    n_q_heads=14,
    n_kv_heads=7,
    head_dim=52,
    intermediate_size=1,
    vocab_size=5003,
    max_context=1,
    rope=RopeSpec((0.0,) * 26),
    softmax_scale=1.0,
    windows=(0, 0, 0),
)

#: A dimension of a layer.
LAYER = re.compile(r"\b([NRS])\d+\b")


def table(spec: GraphSpec) -> str:
    rows = ["| | name | type | shape | meaning |", "|---|---|---|---|---|"]
    for direction, tensors in (("in", spec.inputs), ("out", spec.outputs)):
        rows += [_row(spec, direction, tensor) for tensor in tensors if tensor.name.partition(".")[2] in ("", "0")]
    return "\n".join(rows)


def tables() -> dict[str, str]:
    return {
        "inline": table(inline_spec(MODEL, PAGE_SIZE)),
        "inline-1": table(inline_spec(MODEL, PAGE_SIZE, 1)),
        "segment-first": table(segment_spec(MODEL, 0)),
        "segment-middle": table(segment_spec(MODEL, 2)),
        "segment-last": table(segment_spec(MODEL, 3)),
    }


def render(page: str) -> str:
    return put_tables(page, tables())


def _row(spec: GraphSpec, direction: str, tensor: TensorSpec) -> str:
    shape = ", ".join(
        NAMES.get(size, str(size)) if isinstance(size, int) else LAYER.sub(r"\1{l}", size) for size in tensor.shape
    )
    name = tensor.name.replace(".0", ".{l}")
    meaning = LAYER.sub(r"\1{l}", tensor.meaning.replace(str(PAGE_SIZE), "page_size"))
    if spec.name == "segment_2":  # stands for segment l
        meaning = meaning.replace("layer 1", "layer l - 1").replace("layer 2", "layer l")
    meaning = meaning.replace(f"layer {MODEL.n_layers - 1}", "the last layer")
    return f"| {direction} | `{name}` | {tensor.dtype} | [{shape}] | {meaning} |"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
