"""The attention seam of the inline form in stock ONNX operators.

The meaning is :func:`edgekv.seam.paged_attention`. Two ways lie in one graph, behind an ``If``. A token alone
(:func:`_decode`) reads pages as codes: scales belong to the query and to the probabilities, so that nothing as large as the
cache is multiplied by them. Several tokens (:func:`_prefill`) decode the cache once for all of them, and go over their scores,
the largest tensor by far, as seldom as can be.

What was tried is in docs/architecture.md. Every size may be zero at run time except the number of new tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import onnx
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
#: The same where several tokens attend, counted from a row's largest score among the new tokens: a weight of 4e-18, less than
#: float32 keeps of a sum of so many slots as there can be, and far from a denormal number even in a row that sees something
#: exp(47) times as heavy as the heaviest new token.
NEAR = np.float32(40)
#: Rows of scores that are computed at a time: over 3,000 slots they are 1.5 MB, which a core has near it. Half and twice as many
#: were slower.
FEW_ROWS = 128
_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Geometry:
    """The numbers of a seam; ``window`` 0 sees all, ``softcap`` 0 leaves scores as they are."""

    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    page_size: int
    scale: float
    window: int
    softcap: float = 0.0

    @classmethod
    def of(cls, model: ModelSpec, page_size: int, window: int) -> Geometry:
        """Return the seam of the layers of a model that have this window."""
        heads = (model.n_q_heads, model.n_kv_heads, model.head_dim)
        return cls(*heads, page_size, model.softmax_scale, window, model.softcap)

    @property
    def few_tokens(self) -> int:
        """Tokens that attend to the cache at a time when there are many."""
        return max(1, FEW_ROWS // self.n_q_heads)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.n_q_heads // self.n_kv_heads


@dataclass(frozen=True)
class _Values:
    """What both ways read. S are the cached slots: those of pages first, then recent tokens."""

    #: [T, n_kv_heads, group, head_dim] queries, scaled.
    q: str
    #: [N, n_kv_heads, head_dim] and [n_kv_heads, N, page_size] float32, zero where no token lies.
    key_scales: str
    value_scales: str
    #: [R, n_kv_heads, head_dim] float32, zero where no token lies.
    recent_keys: str
    recent_values: str
    #: [S] bool: which slots hold a token.
    held: str
    #: [T, S] bool: which slots the window of a token reaches; empty where no window applies.
    in_window: str


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
    recent_keys, recent_values = (
        g("Where", token_held, g("Cast", name, to=TensorProto.FLOAT), nothing)
        for name in ("recent_keys", "recent_values")
    )
    return _Values(
        g("Reshape", q, g.ints(-1, shape.n_kv_heads, shape.group, shape.head_dim)),
        key_scales,
        g("Transpose", value_scales, perm=(1, 0, 2)),
        recent_keys,
        recent_values,
        g("Concat", g("Reshape", held, g.ints(-1)), recent_held, axis=0),
        _in_window(g, shape) if shape.window else "",
    )


def _in_window(g: Nodes, shape: Geometry) -> str:
    positions = g("Concat", g("Reshape", "page_positions", g.ints(-1)), "recent_positions", axis=0)
    last_unseen = g("Sub", g("Unsqueeze", "position_ids", g.ints(1)), g.constant(np.int64(shape.window)))
    return g("Greater", g("Unsqueeze", positions, g.ints(0)), last_unseen)


def _decode(g: Nodes, shape: Geometry, values: _Values) -> tuple[str, str]:
    """Attend with one token to at least one page; returns attention and page_mass."""
    kv, group, dim = shape.n_kv_heads, shape.group, shape.head_dim
    q = g("Squeeze", values.q, g.ints(0))
    paged = _page_scores(g, shape, values, q)
    tail_keys = g("Concat", values.recent_keys, "k", axis=0)
    tail = g("MatMul", q, g("Transpose", tail_keys, perm=(1, 2, 0)))
    seen = g("And", values.held, values.in_window) if shape.window else g("Unsqueeze", values.held, g.ints(0))
    bias = g("Where", seen, g.constant(np.float32(0)), g.constant(MASKED))
    bias = g("Concat", bias, g.constant(np.zeros((1, 1), np.float32)), axis=1)
    weights = _softmax(g, g("Add", _capped(g, shape, g("Concat", paged, tail, axis=2)), bias))

    n_slots, end = g("Shape", paged, start=2, end=3), g.ints(_END)
    on_pages = g("Slice", weights, g.ints(0), n_slots, g.ints(2))
    rest = g("Slice", weights, n_slots, end, g.ints(2))
    tail_values = g("Concat", values.recent_values, "v", axis=0)
    tail = g("MatMul", rest, g("Transpose", tail_values, perm=(1, 0, 2)))
    attention = g("Add", _page_values(g, shape, values, on_pages), tail)
    mean = g("ReduceMean", on_pages, g.ints(0, 1), keepdims=0)
    return g("Reshape", attention, g.ints(1, kv * group, dim)), _by_page(g, shape, mean)


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
    """Attend with any number of tokens; returns attention and page_mass.

    New tokens attend to each other, and to what is cached; the two are put together as if one softmax had seen both. With ``c``
    a row's largest score among the new tokens, the softmax over the cached slots has one slot more, of score ``c``: its weight
    tells what the weights of one side are in units of the other. Whatever else a row adds to its scores is part of the product
    (:func:`_attend_to_cached`), so that nothing but a Relu and the softmax, and a window where there is one, goes over
    them. Rows are tokens, then heads of the group.
    """
    kv, group, dim = shape.n_kv_heads, shape.group, shape.head_dim
    n_new = g("Shape", "k", start=0, end=1)
    q = g("Reshape", g("Transpose", values.q, perm=(1, 0, 2, 3)), g.ints(kv, -1, dim))
    among = _capped(g, shape, g("MatMul", q, g("Transpose", "k", perm=(1, 2, 0))))
    among = g("Reshape", among, g("Concat", g.ints(kv, -1, group), n_new, axis=0))
    unseen = g("Where", "causal", g.constant(np.float32(0)), g.constant(MASKED))
    among = g("Add", among, g("Unsqueeze", unseen, g.ints(1)))
    among = g("Reshape", among, g("Concat", g.ints(kv, -1), n_new, axis=0))
    largest = g("ReduceMax", among, g.ints(2), keepdims=1)
    among = _softmax(g, among)
    peak = g("ReduceMax", among, g.ints(2), keepdims=1)
    of_new = g("MatMul", among, g("Transpose", "v", perm=(1, 0, 2)))

    sums, of_cached, share = _attend_to_cached(g, shape, values, (q, largest, peak))
    attention = g("Add", of_cached, g("Mul", share, of_new))
    attention = g("Transpose", g("Reshape", attention, g.ints(kv, -1, group, dim)), perm=(1, 0, 2, 3))
    mean = g("Div", sums, g("Cast", g("Size", share), to=TensorProto.FLOAT))
    on_pages = g("Slice", mean, g.ints(0), g("Reshape", g("Size", "page_positions"), g.ints(1)))
    return g("Reshape", attention, g.ints(-1, kv * group, dim)), _by_page(g, shape, on_pages)


def _attend_to_cached(g: Nodes, shape: Geometry, values: _Values, new: tuple[str, str, str]) -> tuple[str, str, str]:
    """Attend to the cached slots with a few tokens at a time, so that their scores stay in the processor's cache.

    Scores are counted from the least that matters, ``least``: NEAR below a row's largest among the new tokens. So what is below
    it is what a Relu takes away. Queries have two channels more, 1 and -``least``; keys have 0 and 1 there, the key of a slot
    that holds no token MASKED and 1, that of the slot behind the cached ones NEAR and 0.

    Args:
        new: [n_kv_heads, rows, ...] of the new tokens: q [head_dim], the largest score of a row [1], the largest weight [1].

    Returns:
        The weights of all rows summed, [S + 1]; what they read [n_kv_heads, rows, head_dim]; what is left for the new tokens of
        each [n_kv_heads, rows, 1].
    """
    kv, few, dim = shape.n_kv_heads, shape.few_tokens, shape.head_dim
    q, largest, peak = new
    keys, cached_values = _decoded_keys(g, shape, values), _decoded_values(g, shape, values)
    n_slots = g("Shape", cached_values, start=1, end=2)
    missing = g("Mod", g("Neg", g("Shape", "k", start=0, end=1)), g.ints(few))
    missing_rows = g("Concat", g.ints(0), g("Mul", missing, g.ints(shape.group)), axis=0)

    def parts(rows: str, channels: int) -> str:
        """[n_kv_heads, rows, channels], filled up with zeros, as [parts, n_kv_heads, few rows, channels]."""
        padded = g("Pad", rows, missing_rows, "", g.ints(1))
        return g("Transpose", g("Reshape", padded, g.ints(kv, -1, few * shape.group, channels)), perm=(1, 0, 2, 3))

    def whole(parts: str, channels: int) -> str:
        rows = g("Reshape", g("Transpose", parts, perm=(1, 0, 2, 3)), g.ints(kv, -1, channels))
        return g("Slice", rows, g.ints(0), g("Shape", q, start=1, end=2), g.ints(1))

    one = g("Expand", g.constant(np.float32(1)), g("Shape", largest))
    above_least = g("Sub", g.constant(NEAR), largest)
    scanned = [parts(g("Concat", q, one, above_least, axis=2), dim + 2), parts(peak, 1)]
    if shape.window:
        pads = g("Concat", g.ints(0, 0), missing, g.ints(1), axis=0)
        kept = g("Pad", values.in_window, pads, g.constant(np.bool_(True)))
        scanned.append(g("Reshape", kept, g("Concat", g.ints(-1, few), n_slots, axis=0)))
    sums, read, left = (f"{g.scope}{name}" for name in ("sums", "read", "left"))
    body = _with_few(g.branch("few"), shape, keys, cached_values)
    start = g("ConstantOfShape", n_slots)
    scan = helper.make_node(
        "Scan", [start, *scanned], [sums, read, left], name=f"{g.scope}scan", body=body, num_scan_inputs=len(scanned)
    )
    g.nodes.append(scan)
    return sums, whole(read, dim), whole(left, 1)


def _with_few(g: Nodes, shape: Geometry, keys: str, cached_values: str) -> onnx.GraphProto:
    """Return what is done with each part of the rows."""
    kv, group = shape.n_kv_heads, shape.group
    sums, queries, peak, kept = (f"{g.scope}{name}" for name in ("sums_before", "queries", "peak", "kept"))
    scores = _counted_scores(g, shape, queries, keys)
    last = g("Shape", scores, start=2, end=3)
    if shape.window:
        by_head = g("Reshape", scores, g("Concat", g.ints(kv, -1, group), last, axis=0))
        seen = g("Where", g("Unsqueeze", kept, g.ints(1)), by_head, g.constant(MASKED))
        scores = g("Reshape", seen, g("Concat", g.ints(kv, -1), last, axis=0))
    weights = g("Softmax", g("Relu", scores), axis=-1)
    # Of one softmax over all that a row sees. Rows that only fill up have a peak of 0, and count for nothing.
    heaviest = g("Slice", weights, g.ints(-1), g.ints(_END), g.ints(2))
    of_cached = g("Mul", peak, g("Sub", g.constant(np.float32(1)), heaviest))
    total = g("Add", of_cached, heaviest)
    factor = g("Div", peak, total)
    read = g("Mul", g("MatMul", weights, cached_values), factor)
    left = g("Div", heaviest, total)
    # The sum over rows, as a product.
    by_row = g("Reshape", weights, g("Concat", g.ints(-1), last, axis=0))
    added = g("Reshape", g("MatMul", g("Reshape", factor, g.ints(1, -1)), by_row), g.ints(-1))
    inputs = [(sums, TensorProto.FLOAT), (queries, TensorProto.FLOAT), (peak, TensorProto.FLOAT)]
    inputs += [(kept, TensorProto.BOOL)] * bool(shape.window)
    return g.as_graph((g("Add", sums, added), 1), (read, 3), (left, 3), inputs=inputs)


def _counted_scores(g: Nodes, shape: Geometry, queries: str, keys: str) -> str:
    """Return queries times keys; where scores are capped, the two channels that count from the least are a product apart."""
    if not shape.softcap:
        return g("MatMul", queries, keys)
    start, dim, end = g.ints(0), g.ints(shape.head_dim), g.ints(_END)
    own, counted = (
        g("MatMul", g("Slice", queries, *span, g.ints(2)), g("Slice", keys, *span, g.ints(1)))
        for span in ((start, dim), (dim, end))
    )
    return g("Add", _capped(g, shape, own), counted)


def _capped(g: Nodes, shape: Geometry, scores: str) -> str:
    """Return scores as the model caps them."""
    if not shape.softcap:
        return scores
    within = g("Tanh", g("Mul", scores, g.constant(np.float32(1 / shape.softcap))))
    return g("Mul", within, g.constant(np.float32(shape.softcap)))


def _decoded_keys(g: Nodes, shape: Geometry, values: _Values) -> str:
    """Return the keys of all cached slots and one more, with two channels more, [n_kv_heads, head_dim + 2, S + 1]."""
    kv, dim = shape.n_kv_heads, shape.head_dim
    codes = g("DequantizeLinear", g("Transpose", "key_pages", perm=(1, 2, 0, 3)), g.constant(np.float32(1)))
    scales = g("Unsqueeze", g("Transpose", values.key_scales, perm=(1, 2, 0)), g.ints(3))
    paged = g("Reshape", g("Mul", codes, scales), g.ints(kv, dim, -1))
    recent = g("Transpose", values.recent_keys, perm=(1, 2, 0))
    keys = g("Concat", paged, recent, g("ConstantOfShape", g.ints(kv, dim, 1)), axis=2)
    masked = g("Where", values.held, g.constant(np.float32(0)), g.constant(MASKED))
    counted = g("Expand", g.constant(np.float32(1)), g("Shape", masked))
    held = g("Concat", *(g("Unsqueeze", channel, g.ints(0, 1)) for channel in (masked, counted)), axis=1)
    more = g("Concat", held, g.constant(np.array([[[NEAR], [0]]], np.float32)), axis=2)
    return g("Concat", keys, g("Expand", more, g.ints(kv, 1, 1)), axis=1)


def _decoded_values(g: Nodes, shape: Geometry, values: _Values) -> str:
    """Return the values of all cached slots, and zeros behind them, [n_kv_heads, S + 1, head_dim]."""
    kv, dim = shape.n_kv_heads, shape.head_dim
    codes = g("DequantizeLinear", g("Transpose", "value_pages", perm=(1, 0, 2, 3)), g.constant(np.float32(1)))
    paged = g("Reshape", g("Mul", codes, g("Unsqueeze", values.value_scales, g.ints(3))), g.ints(kv, -1, dim))
    recent = g("Transpose", values.recent_values, perm=(1, 0, 2))
    return g("Concat", paged, recent, g("ConstantOfShape", g.ints(kv, 1, dim)), axis=1)


def _softmax(g: Nodes, scores: str) -> str:
    least = g("Sub", g("ReduceMax", scores, g.ints(-1), keepdims=1), g.constant(RANGE))
    return g("Softmax", g("Max", scores, least), axis=-1)


def _by_page(g: Nodes, shape: Geometry, weights: str) -> str:
    """Return [N]: the weights [N * page_size] of each page, summed."""
    return g("ReduceSum", g("Reshape", weights, g.ints(-1, shape.page_size)), g.ints(1), keepdims=0)
