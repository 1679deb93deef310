"""Products with 4-bit weights: our operator in ONNX Runtime's sessions, against NumPy and against ONNX Runtime's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.sessions import session_options

kernels = pytest.importorskip("edgekv.runtime._kernels", reason="the native extension is not built")
pytestmark = pytest.mark.skipif(
    not kernels.dense_names(), reason="no kernels for 4-bit products on this processor: ONNX Runtime's own serve"
)

BLOCK = 32
Float = NDArray[np.float32]


class Matrix:
    """Random 4-bit weights [n, k]."""

    def __init__(self, n: int, k: int, *, zeros: bool, seed: int, bias: bool = False) -> None:
        random = np.random.default_rng(seed)
        blocks = -(-k // BLOCK)
        self.n, self.k = n, k
        self.codes = random.integers(0, 256, (n, blocks, BLOCK // 2), np.uint8)
        self.scales = random.uniform(0.001, 0.1, (n, blocks)).astype(np.float32)
        self.zeros = random.integers(0, 256, (n, -(-blocks // 2)), np.uint8) if zeros else None
        self.bias = random.standard_normal(n).astype(np.float32) if bias else None

    def decoded(self) -> Float:
        """The weights, [n, k]."""
        codes = np.stack([self.codes & 15, self.codes >> 4], axis=-1).reshape(self.n, -1, BLOCK).astype(np.float32)
        zeros: Float | float = 8.0
        if self.zeros is not None:
            pairs = np.stack([self.zeros & 15, self.zeros >> 4], axis=-1).reshape(self.n, -1)
            zeros = pairs[:, : codes.shape[1], None].astype(np.float32)
        return ((codes - zeros) * self.scales[:, :, None]).reshape(self.n, -1)[:, : self.k]

    def model(self, **changed: Any) -> bytes:
        """A graph of one product."""
        # An input that is not given has no name.
        inputs = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros, "": None, "bias": self.bias}
        tensors = {name: array for name, array in inputs.items() if array is not None}
        attributes = {"K": self.k, "N": self.n, "bits": 4, "block_size": BLOCK, "accuracy_level": 4} | changed
        node = onnx.helper.make_node(
            "MatMulNBits",
            ["x", *(name if name in tensors else "" for name in inputs)],
            ["y"],
            domain="com.microsoft",
            **attributes,
        )
        graph = onnx.helper.make_graph(
            [node],
            "product",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", self.k])],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", self.n])],
            [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()],
        )
        opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
        return bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def open_session(model: bytes, *, ours: bool) -> ort.InferenceSession:
    options = session_options()
    if ours:
        options.register_custom_ops_library(kernels.__file__)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def relative_error(y: Float, truth: Float) -> float:
    return float(np.sqrt(np.mean((y - truth) ** 2) / np.mean(truth**2)))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 80),
    k=st.integers(1, 12).map(lambda blocks: 16 * blocks),
    rows=st.integers(1, 70),
    zeros=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
@example(n=300, k=1056, rows=1, zeros=True, bias=True, seed=0)
@example(n=300, k=1056, rows=33, zeros=True, bias=True, seed=0)
@example(n=64, k=2816, rows=128, zeros=False, bias=False, seed=0)
def test_a_product_is_that_of_the_decoded_weights(
    n: int, k: int, rows: int, zeros: bool, bias: bool, seed: int
) -> None:
    matrix = Matrix(n, k, zeros=zeros, bias=bias, seed=seed)
    x = np.random.default_rng(seed).standard_normal((rows, k)).astype(np.float32)
    (y,) = open_session(matrix.model(), ours=True).run(None, {"x": x})
    # Rows of 8 bits are within 1/254 of their block's largest number; tiles have 8 bits of each number.
    bound = np.abs(x).max() / 127 * np.abs(matrix.decoded()).sum(axis=1) + 1e-4
    truth = x @ matrix.decoded().T + (0 if matrix.bias is None else matrix.bias)
    assert np.all(np.abs(y - truth) <= bound)


def rounded_rows(x: Float) -> Float:
    """The rows [rows, k] as 8-bit numbers with a scale per block."""
    blocks = x.reshape(len(x), -1, BLOCK)
    peaks = np.abs(blocks).max(axis=-1, keepdims=True)
    rounded: Float = (np.rint(blocks * (127 / peaks)) * (peaks / 127)).reshape(x.shape).astype(np.float32)
    return rounded


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_a_few_rows_are_numbers_of_8_bits(rows: int) -> None:
    matrix = Matrix(97, 352, zeros=True, seed=rows)
    x = np.random.default_rng(0).standard_normal((rows, 352)).astype(np.float32)
    (y,) = open_session(matrix.model(), ours=True).run(None, {"x": x})
    assert relative_error(y, rounded_rows(x) @ matrix.decoded().T) < 1e-5


@pytest.mark.skipif(kernels.dense_names() == "neon", reason="ONNX Runtime does not round rows without dot products")
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_a_few_rows_give_what_onnx_runtime_gives(rows: int) -> None:
    matrix = Matrix(96, 352, zeros=True, seed=rows)
    x = np.random.default_rng(0).standard_normal((rows, 352)).astype(np.float32)
    (ours,), (theirs,) = (open_session(matrix.model(), ours=ours).run(None, {"x": x}) for ours in (True, False))
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("rows", [20, 100, 256])
def test_many_rows_are_no_further_from_the_truth_than_numbers_of_8_bits(rows: int) -> None:
    matrix = Matrix(96, 1024, zeros=True, seed=rows)
    x = np.random.default_rng(0).standard_normal((rows, 1024)).astype(np.float32)
    truth = x @ matrix.decoded().T
    (y,) = open_session(matrix.model(), ours=True).run(None, {"x": x})
    assert relative_error(y, truth) <= relative_error(rounded_rows(x) @ matrix.decoded().T, truth) * 1.01


@pytest.mark.parametrize("rows", [1, 40])
def test_rows_of_zeros_and_of_huge_numbers_stay_apart(rows: int) -> None:
    matrix = Matrix(32, 64, zeros=False, seed=0)
    x = np.zeros((rows, 64), np.float32)
    x[-1] = 1e30
    (y,) = open_session(matrix.model(), ours=True).run(None, {"x": x})
    assert np.all(y[:-1] == 0)
    assert np.isfinite(y).all()
    assert relative_error(y[-1] / 1e30, x[-1] / 1e30 @ matrix.decoded().T) < 0.01


def test_no_rows_give_no_rows() -> None:
    (y,) = open_session(Matrix(8, 32, zeros=False, seed=0).model(), ours=True).run(
        None, {"x": np.zeros((0, 32), np.float32)}
    )
    assert y.shape == (0, 8)


@pytest.mark.parametrize("changed", [{"block_size": 64}, {"bits": 8}, {"accuracy_level": 1}])
def test_what_the_kernels_cannot_do_is_refused_when_the_session_opens(changed: dict[str, int]) -> None:
    with pytest.raises(Exception, match="4 bits, blocks of 32 and accuracy level 4"):
        open_session(Matrix(8, 64, zeros=False, seed=0).model(**changed), ours=True)


def test_weights_of_another_size_than_the_graph_says_are_refused() -> None:
    matrix = Matrix(8, 64, zeros=False, seed=0)
    session = open_session(matrix.model(N=9), ours=True)
    with pytest.raises(Exception, match="do not have the size"):
        session.run(None, {"x": np.zeros((1, 64), np.float32)})
