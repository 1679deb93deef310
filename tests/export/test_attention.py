"""The seam in stock operations means what edgekv.seam means, whatever the sizes and whatever lies where no token is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.contract import INLINE_CACHE, GraphSpec, TensorSpec, inline_spec
from edgekv.export.onnx.graph_builder import GraphBuilder
from edgekv.export.onnx.seam import Geometry, build_seam
from edgekv.seam import PageView, paged_attention
from edgekv.spec import ModelSpec, RopeSpec
from tests.sessions import session_options

from .cached_layer import Shape, make_layer

Q_HEADS, KV_HEADS, DIM, PAGE = 4, 2, 32, 16
SCALE = DIM**-0.5
MODEL = ModelSpec("", 1, 1, Q_HEADS, KV_HEADS, DIM, 1, 1, 1, RopeSpec((0.0,)), SCALE, (0,))
Open = Callable[..., ort.InferenceSession]


@pytest.fixture(scope="module")
def seam(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Return a function that gives the seam of a layer with some window as a graph of its own."""
    folder, made = tmp_path_factory.mktemp("seam"), {}
    cached = {tensor.name.partition(".")[0]: tensor for tensor in inline_spec(MODEL, PAGE).inputs}
    fresh = [("q", ("T", Q_HEADS, DIM)), ("k", ("T", KV_HEADS, DIM)), ("v", ("T", KV_HEADS, DIM))]
    inputs = [TensorSpec(name, "float32", shape, "") for name, shape in fresh]
    inputs += [TensorSpec(name, cached[name].dtype, cached[name].shape, "") for name in INLINE_CACHE]
    inputs.append(TensorSpec("position_ids", "int64", ("T",), ""))
    inputs += [TensorSpec("causal", "bool", ("T", "T"), ""), TensorSpec("alone", "bool", (), "")]
    outputs = (
        TensorSpec("attention", "float32", ("T", Q_HEADS, DIM), ""),
        TensorSpec("page_mass", "float32", ("N",), ""),
    )

    def get(window: int, softcap: float = 0.0) -> ort.InferenceSession:
        if (window, softcap) not in made:
            builder = GraphBuilder(None)  # type: ignore[arg-type]  # no weights
            builder.add(build_seam(Geometry.of(replace(MODEL, softcap=softcap), PAGE, window)), "/seam", {})
            path = folder / f"seam_{window}_{softcap}.onnx"
            builder.save(GraphSpec("seam", tuple(inputs), outputs), path)
            made[window, softcap] = ort.InferenceSession(path, session_options())
        return made[window, softcap]

    return get


@dataclass
class Case:
    """What a step takes, as the contract lays it out, and the decoded pages of it for the reference."""

    feeds: dict[str, Any]
    views: list[PageView]
    n_pages: int


def make_case(seed: int, n_new: int, n_pages: int, n_recent: int, live: float, window: int) -> Case:
    """Make a step that follows everything that is cached."""
    rng = np.random.default_rng(seed)
    length = n_pages * PAGE + n_recent
    positions = np.arange(length, length + n_new)
    q = rng.standard_normal((n_new, Q_HEADS, DIM)).astype(np.float32)
    k, v = (rng.standard_normal((n_new, KV_HEADS, DIM)).astype(np.float32) for _ in range(2))
    cache, views = make_layer(rng, Shape(KV_HEADS, DIM, PAGE), n_pages, n_recent, live, length)
    distance = positions[:, None] - positions[None, :]
    feeds = {
        "q": q, "k": k, "v": v, **cache, "position_ids": positions,
        "causal": (distance >= 0) & (distance < (window or 10**6)), "alone": np.array(n_new == 1),
    }  # fmt: skip
    return Case(feeds, views, n_pages)


@pytest.mark.parametrize("window", [0, 20])
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    n_new=st.integers(1, 6) | st.sampled_from([31, 32, 33, 70]),
    n_pages=st.integers(0, 5),
    n_recent=st.integers(0, 20),
    live=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
)
def test_inline_attention_equals_the_seam(
    seam: Open, window: int, seed: int, n_new: int, n_pages: int, n_recent: int, live: float
) -> None:
    case = make_case(seed, n_new, n_pages, n_recent, live, window)
    out, mass = seam(window).run(None, case.feeds)
    q, k, v, positions = (case.feeds[name] for name in ("q", "k", "v", "position_ids"))
    expected, expected_mass = paged_attention(q, k, v, case.views, positions, scale=SCALE, window=window)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(mass, expected_mass[: case.n_pages], atol=1e-6)


@pytest.mark.parametrize(("n_new", "n_pages", "n_recent"), [(1, 3, 7), (33, 3, 7), (5, 0, 4), (2, 2, 0)])
@pytest.mark.parametrize("window", [0, 20])
def test_capped_scores_are_those_of_the_seam(seam: Open, window: int, n_new: int, n_pages: int, n_recent: int) -> None:
    case = make_case(3, n_new, n_pages, n_recent, 0.7, window)
    case.feeds["q"] *= 5
    out, mass = seam(window, 1.5).run(None, case.feeds)
    q, k, v, positions = (case.feeds[name] for name in ("q", "k", "v", "position_ids"))
    shape = {"scale": SCALE, "softcap": 1.5}
    expected, expected_mass = paged_attention(q, k, v, case.views, positions, window=window, **shape)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(mass, expected_mass[:n_pages], atol=1e-6)


@pytest.mark.parametrize("n_new", [1, 3])
def test_the_order_of_pages_does_not_matter(seam: Open, n_new: int) -> None:
    case = make_case(1, n_new, 5, 7, 0.8, 0)
    order = np.array([3, 0, 4, 2, 1])
    mixed = {name: case.feeds[name][order] for name in INLINE_CACHE[:5]}
    (out, mass), (other, other_mass) = (seam(0).run(None, feeds) for feeds in (case.feeds, {**case.feeds, **mixed}))
    np.testing.assert_allclose(other, out, atol=1e-5)
    np.testing.assert_allclose(other_mass, mass[order], atol=1e-6)


@pytest.mark.parametrize("n_pages", [3, 300])
def test_a_token_alone_is_as_exact_as_floats_are(seam: Open, n_pages: int) -> None:
    case = make_case(2, 1, n_pages, 0, 1.0, 0)
    case.feeds["q"] *= 20  # a few tokens have nearly all the weight
    out, _ = seam(0).run(None, case.feeds)
    prefill, _ = seam(0).run(None, {**case.feeds, "alone": np.array(False)})
    np.testing.assert_allclose(out, prefill, atol=3e-5 * np.abs(prefill).max())
