"""The attention seam of the inline form in stock ONNX operators.

The meaning is :func:`edgekv.seam.paged_attention`. Two ways lie in one graph, behind an ``If``. A token alone
(:func:`_decode`) reads pages as codes: scales belong to the query and to the probabilities, so that nothing as large as the
cache is multiplied by them. Several tokens (:func:`_prefill`) decode the cache once for all of them.

What was tried is in docs/architecture.md. Every size may be zero at run time except the number of new tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from edgekv.contract import INLINE_CACHE
from edgekv.spec import ModelSpec

from .nodes import Nodes
from .pieces import Piece

#: Stands for minus infinity in a masked score: far below any real score, and finite, so that no difference is NaN.
MASKED = np.float32(-1e30)
#: Queries and probabilities are written in digits of 7 bits: where processors add two products of a full uint8 and a code
#: in 16 bits (without VNNI) the sum overflows. Three digits are 20 bits and a sign, about what float32 keeps of a sum.
DIGIT_BITS, DIGITS = 7, 3
PLACES = np.array([1 << DIGIT_BITS * place for place in reversed(range(DIGITS))], np.float32)
_LARGEST = np.float32(((1 << (DIGIT_BITS - 1)) - 1) * PLACES[0])
#: Scores this far below the largest of their row count as that far: a weight of 1e-35. Smaller ones would be denormal
#: numbers, with which the product with the values took ten times as long on x86.
RANGE = np.float32(80)


@dataclass(frozen=True)
class Geometry:
    """The numbers of a seam; ``window`` 0 sees all."""

    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    page_size: int
    scale: float
    window: int

    @classmethod
    def of(cls, model: ModelSpec, page_size: int, window: int) -> Geometry:
        """Return the seam of the layers of a model that have this window."""
        return cls(model.n_q_heads, model.n_kv_heads, model.head_dim, page_size, model.softmax_scale, window)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.n_q_heads // self.n_kv_heads


@dataclass(frozen=True)
class _Values:
    """What both ways read. [..., S] lists pages first, then recent tokens."""

    #: [T, n_kv_heads, group, head_dim] queries, scaled.
    q: str
    #: [N, n_kv_heads, head_dim] and [n_kv_heads, N, page_size] float32, zero where no token lies.
    key_scales: str
    value_scales: str
    #: [R + T, n_kv_heads, head_dim] float32: recent tokens and new ones.
    tail_keys: str
    tail_values: str
    #: [T or 1, S] float32: 0 where a slot is seen, MASKED elsewhere.
    bias: str


def build_seam(shape: Geometry) -> Piece:
    """Return one layer's seam: inputs as the contract lays them out, and q, k, v, ``causal`` [T, T] and ``alone`` [] bool.

    Gives attention [T, n_q_heads, head_dim] and page_mass [N].
    """
    g = Nodes()
    values = _prepare(g, shape)
    # A layer without a page takes the way on which no product is over nothing.
    has_pages = g("Greater", g("Size", "key_pages"), g.constant(np.int64(0)))
    decode, prefill = g.branch("decode"), g.branch("prefill")
    outputs = [_decode(decode, shape, values), _prefill(prefill, shape, values)]
    node = helper.make_node(
        "If",
        [g("And", "alone", has_pages)],
        ["attention", "page_mass"],
        name="if",
        then_branch=decode.as_graph(*zip(outputs[0], (3, 1), strict=True)),
        else_branch=prefill.as_graph(*zip(outputs[1], (3, 1), strict=True)),
    )
    inputs = ("q", "k", "v", *INLINE_CACHE, "position_ids", "causal", "alone")
    return Piece(inputs, ("attention", "page_mass"), (), tuple(g.constants.values()), (*g.nodes, node))


def _prepare(g: Nodes, shape: Geometry) -> _Values:
    zero, nothing = g.constant(np.int64(0)), g.constant(np.float32(0))
    q = g("Mul", "q", g.constant(np.float32(shape.scale)))
    held = g("GreaterOrEqual", "page_positions", zero)
    recent_held = g("GreaterOrEqual", "recent_positions", zero)
    newest = g("ReduceMax", "page_positions", g.ints(1), keepdims=0)
    page_held = g("Unsqueeze", g("GreaterOrEqual", newest, zero), g.ints(1, 2))
    # Where no token lies there may be anything, even NaN, and 0 * NaN is NaN.
    key_scales = g("Where", page_held, g("Cast", "key_scales", to=TensorProto.FLOAT), nothing)
    slots_held = g("Unsqueeze", held, g.ints(1))
    value_scales = g("Where", slots_held, g("Cast", "value_scales", to=TensorProto.FLOAT), nothing)
    token_held = g("Unsqueeze", recent_held, g.ints(1, 2))
    tails = []
    for recent, new in (("recent_keys", "k"), ("recent_values", "v")):
        kept = g("Where", token_held, g("Cast", recent, to=TensorProto.FLOAT), nothing)
        tails.append(g("Concat", kept, new, axis=0))
    return _Values(
        g("Reshape", q, g.ints(-1, shape.n_kv_heads, shape.group, shape.head_dim)),
        key_scales,
        g("Transpose", value_scales, perm=(1, 0, 2)),
        tails[0],
        tails[1],
        _bias(g, shape, held, recent_held),
    )


def _bias(g: Nodes, shape: Geometry, held: str, recent_held: str) -> str:
    """Return [T or 1, S]: one row for all new tokens where no window applies."""
    seen = g("Concat", g("Reshape", held, g.ints(-1)), recent_held, axis=0)
    seen = g("Unsqueeze", seen, g.ints(0))
    if shape.window:
        positions = g("Concat", g("Reshape", "page_positions", g.ints(-1)), "recent_positions", axis=0)
        last_unseen = g("Sub", g("Unsqueeze", "position_ids", g.ints(1)), g.constant(np.int64(shape.window)))
        seen = g("And", seen, g("Greater", g("Unsqueeze", positions, g.ints(0)), last_unseen))
    return g("Where", seen, g.constant(np.float32(0)), g.constant(MASKED))


def _decode(g: Nodes, shape: Geometry, values: _Values) -> tuple[str, str]:
    """Attend with one token to at least one page; returns attention and page_mass."""
    kv, group, dim = shape.n_kv_heads, shape.group, shape.head_dim
    q = g("Squeeze", values.q, g.ints(0))
    paged = _page_scores(g, shape, values, q)
    tail = g("MatMul", q, g("Transpose", values.tail_keys, perm=(1, 2, 0)))
    bias = g("Concat", values.bias, g.constant(np.zeros((1, 1), np.float32)), axis=1)
    weights = _softmax(g, g("Add", g("Concat", paged, tail, axis=2), bias))

    n_slots, end = g("Shape", paged, start=2, end=3), g.ints(np.iinfo(np.int64).max)
    on_pages = g("Slice", weights, g.ints(0), n_slots, g.ints(2))
    rest = g("Slice", weights, n_slots, end, g.ints(2))
    tail = g("MatMul", rest, g("Transpose", values.tail_values, perm=(1, 0, 2)))
    attention = g("Add", _page_values(g, shape, values, on_pages), tail)
    return g("Reshape", attention, g.ints(1, kv * group, dim)), _mass(g, shape, weights, n_slots, 0, 1)


def _page_scores(g: Nodes, shape: Geometry, values: _Values, q: str) -> str:
    """Return q [n_kv_heads, group, head_dim] times the keys of all pages, [n_kv_heads, group, slots].

    The scale of a channel goes to the query, page by page.
    """
    kv, group = shape.n_kv_heads, shape.group
    largest_scale = g("Unsqueeze", g("ReduceMax", values.key_scales, g.ints(0), keepdims=0), g.ints(1))
    to_whole, to_float = _precision(g, g("ReduceMax", g("Mul", g("Abs", q), largest_scale), g.ints(2), keepdims=1))
    scaled = g("Mul", g("Mul", q, to_whole), g("Unsqueeze", values.key_scales, g.ints(2)))
    sums = _of_digits(
        g, g("MatMulInteger", _digits(g, scaled, axis=2), "key_pages", _middle(g)), g.ints(0, kv, DIGITS, -1)
    )
    sums = g("Transpose", g("Reshape", sums, g.ints(0, kv, group, shape.page_size)), perm=(1, 2, 0, 3))
    return g("Mul", g("Reshape", sums, g.ints(kv, group, -1)), to_float)


def _page_values(g: Nodes, shape: Geometry, values: _Values, weights: str) -> str:
    """Return weights [n_kv_heads, group, slots] times the values of all pages, [n_kv_heads, group, head_dim].

    The scale of a token goes to its weight, and one product sums over all slots.
    """
    kv, group, dim = shape.n_kv_heads, shape.group, shape.head_dim
    weights = g("Mul", weights, g("Reshape", values.value_scales, g.ints(kv, 1, -1)))
    to_whole, to_float = _precision(g, g("ReduceMax", weights, g.ints(2), keepdims=1))
    codes = g("Reshape", g("Transpose", "value_pages", perm=(1, 0, 2, 3)), g.ints(kv, -1, dim))
    sums = g("MatMulInteger", _digits(g, g("Mul", weights, to_whole), axis=1), codes, _middle(g))
    return g("Mul", g("Reshape", _of_digits(g, sums, g.ints(kv, DIGITS, -1)), g.ints(kv, group, dim)), to_float)


def _precision(g: Nodes, peak: str) -> tuple[str, str]:
    """Return by what to multiply numbers of at most ``peak`` to write them in digits, and by what to multiply the result."""
    peak = g("Max", peak, g.constant(np.finfo(np.float32).tiny))
    return g("Div", g.constant(_LARGEST), peak), g("Mul", peak, g.constant(1 / _LARGEST))


def _digits(g: Nodes, whole: str, axis: int) -> str:
    """Write numbers of at most _LARGEST in digits, the highest first, side by side along ``axis`` as uint8.

    A digit is what is left, rounded to its place; :func:`_middle` stands for 0.
    """
    zero, scales = _middle(g), [g.constant(place) for place in PLACES]
    digits = [g("QuantizeLinear", whole, scales[0], zero)]
    for above, scale in itertools.pairwise(scales):
        whole = g("Sub", whole, g("DequantizeLinear", digits[-1], above, zero))
        digits.append(g("QuantizeLinear", whole, scale, zero))
    return g("Concat", *digits, axis=axis)


def _of_digits(g: Nodes, sums: str, shape: str) -> str:
    """Put products of digits together: int32, to be reshaped to [..., DIGITS, n], gives [..., 1, n] float32."""
    return g("MatMul", g.constant(np.array([PLACES])), g("Reshape", g("Cast", sums, to=TensorProto.FLOAT), shape))


def _middle(g: Nodes) -> str:
    return g.constant(np.uint8(1 << (DIGIT_BITS - 1)))


def _prefill(g: Nodes, shape: Geometry, values: _Values) -> tuple[str, str]:
    """Attend with any number of tokens; returns attention and page_mass."""
    kv, group, dim = shape.n_kv_heads, shape.group, shape.head_dim
    one = g.constant(np.float32(1))
    q = g("Transpose", values.q, perm=(1, 2, 0, 3))
    codes = g("DequantizeLinear", g("Transpose", "key_pages", perm=(1, 2, 0, 3)), one)
    scales = g("Unsqueeze", g("Transpose", values.key_scales, perm=(1, 2, 0)), g.ints(3))
    keys = g("Reshape", g("Mul", codes, scales), g.ints(kv, 1, dim, -1))
    tail = g("Unsqueeze", g("Transpose", values.tail_keys, perm=(1, 2, 0)), g.ints(1))
    scores = g("MatMul", q, g("Concat", keys, tail, axis=3))
    causal = g("Where", "causal", g.constant(np.float32(0)), g.constant(MASKED))
    bias = g("Expand", values.bias, g("Concat", g("Shape", q, start=2, end=3), g.ints(1), axis=0))
    weights = _softmax(g, g("Add", scores, g("Concat", bias, causal, axis=1)))

    codes = g("DequantizeLinear", g("Transpose", "value_pages", perm=(1, 0, 2, 3)), one)
    paged = g("Reshape", g("Mul", codes, g("Unsqueeze", values.value_scales, g.ints(3))), g.ints(kv, 1, -1, dim))
    tail = g("Unsqueeze", g("Transpose", values.tail_values, perm=(1, 0, 2)), g.ints(1))
    attention = g("MatMul", weights, g("Concat", paged, tail, axis=2))
    attention = g("Reshape", g("Transpose", attention, perm=(2, 0, 1, 3)), g.ints(-1, kv * group, dim))
    return attention, _mass(g, shape, weights, g("Shape", paged, start=2, end=3), 0, 1, 2)


def _softmax(g: Nodes, scores: str) -> str:
    least = g("Sub", g("ReduceMax", scores, g.ints(-1), keepdims=1), g.constant(RANGE))
    return g("Softmax", g("Max", scores, least), axis=-1)


def _mass(g: Nodes, shape: Geometry, weights: str, n_slots: str, *axes: int) -> str:
    """Return [N]: the mean over ``axes`` of weights [..., S + T], summed over each page."""
    slots = g("Slice", g("ReduceMean", weights, g.ints(*axes), keepdims=0), g.ints(0), n_slots)
    return g("ReduceSum", g("Reshape", slots, g.ints(-1, shape.page_size)), g.ints(1), keepdims=0)
