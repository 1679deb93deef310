"""The seam in stock operations means what edgekv.seam means."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from edgekv.contract import GraphSpec, TensorSpec
from edgekv.export.onnx.graph_builder import GraphBuilder
from edgekv.export.onnx.pieces import export_attention
from edgekv.seam import PageView, paged_attention
from tests.sessions import session_options

T, Q_HEADS, KV_HEADS, DIM, PAGE = 5, 4, 2, 32, 16
SCALE = DIM**-0.5
Row = tuple[str, str, tuple[int | str, ...]]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> ort.InferenceSession:
    piece = export_attention(Q_HEADS, KV_HEADS, DIM, SCALE, PAGE)
    cache, page = ("N", KV_HEADS, PAGE, DIM), ("N", KV_HEADS)
    inputs: tuple[Row, ...] = (
        ("q", "float32", ("T", Q_HEADS, DIM)),
        ("k", "float32", ("T", KV_HEADS, DIM)),
        ("v", "float32", ("T", KV_HEADS, DIM)),
        ("key_pages", "int8", cache),
        ("key_scales", "float16", (*page, DIM)),
        ("value_pages", "int8", cache),
        ("value_scales", "float16", (*page, PAGE)),
        ("recent_keys", "float16", ("R", KV_HEADS, DIM)),
        ("recent_values", "float16", ("R", KV_HEADS, DIM)),
        ("slot_mask", "bool", ("T", "S")),
        ("causal", "bool", ("T", "T")),
    )
    outputs: tuple[Row, ...] = (("attention", "float32", ("T", Q_HEADS, DIM)), ("page_mass", "float32", ("N",)))
    spec = GraphSpec(
        "seam", *(tuple(TensorSpec(name, kind, shape, "") for name, kind, shape in rows) for rows in (inputs, outputs))
    )
    builder = GraphBuilder(None)  # type: ignore[arg-type]  # no weights
    builder.add(piece, "/seam", {})
    path = tmp_path_factory.mktemp("seam") / "seam.onnx"
    builder.save(spec, path)
    return ort.InferenceSession(path, session_options())


@pytest.mark.parametrize("n_new", [1, T])
@pytest.mark.parametrize(("n_pages", "n_recent"), [(0, 0), (0, 9), (3, 0), (3, 9)])
@pytest.mark.parametrize("window", [0, 20])
def test_inline_attention_equals_the_seam(
    session: ort.InferenceSession, n_new: int, n_pages: int, n_recent: int, window: int
) -> None:
    rng = np.random.default_rng(n_pages + n_recent)
    q = rng.standard_normal((n_new, Q_HEADS, DIM)).astype(np.float32)
    k, v = (rng.standard_normal((n_new, KV_HEADS, DIM)).astype(np.float32) for _ in range(2))
    codes = rng.integers(-127, 128, (2, n_pages, KV_HEADS, PAGE, DIM)).astype(np.int8)
    k_scales = rng.uniform(0, 0.02, (n_pages, KV_HEADS, DIM)).astype(np.float16)
    v_scales = rng.uniform(0, 0.02, (n_pages, KV_HEADS, PAGE)).astype(np.float16)
    recent = rng.standard_normal((2, n_recent, KV_HEADS, DIM)).astype(np.float16)
    length = n_pages * PAGE + n_recent
    live = rng.random(length) < 0.7
    old, positions = np.arange(length), np.arange(length, length + n_new)
    if n_pages:
        v_scales[0, 0, 3] = np.nan  # what lies in a dead slot is never read
        live[3] = False
    if n_recent:
        recent[:, -1] = np.nan
        live[-1] = False

    distance = positions[:, None] - positions[None, :]
    causal = (distance >= 0) & (distance < (window or 10**6))
    mask = live[None, :] & (positions[:, None] - old[None, :] < (window or 10**6))
    out, mass = session.run(
        None,
        {"q": q, "k": k, "v": v, "key_pages": codes[0], "key_scales": k_scales, "value_pages": codes[1],
         "value_scales": v_scales, "recent_keys": recent[0], "recent_values": recent[1], "slot_mask": mask, "causal": causal},
    )  # fmt: skip

    keys = codes[0].astype(np.float32) * k_scales.astype(np.float32)[:, :, None, :]
    values = codes[1].astype(np.float32) * v_scales.astype(np.float32)[:, :, :, None]
    views = [
        PageView(keys[p], values[p], live[p * PAGE :][:PAGE], old[p * PAGE :][:PAGE].astype(np.int64))
        for p in range(n_pages)
    ]
    if n_recent:
        tail = recent.astype(np.float32).transpose(0, 2, 1, 3)
        views.append(PageView(tail[0], tail[1], live[n_pages * PAGE :], old[n_pages * PAGE :].astype(np.int64)))
    expected, expected_mass = paged_attention(q, k, v, views, positions.astype(np.int64), scale=SCALE, window=window)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(mass, expected_mass[:n_pages], atol=1e-6)
