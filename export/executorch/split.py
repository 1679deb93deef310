"""A checkpoint written as an ExecuTorch program: the split form, one method per segment and size.

Method ``segment_{l}_t{T}`` takes and gives what :func:`edgekv.contract.segment_spec` says, for exactly T rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from edgekv.bundle import EmbeddingSpec
from edgekv.contract import EXECUTORCH_HEAD_ROWS, EXECUTORCH_ROWS, executorch_method, segment_spec
from edgekv.errors import UsageError

from ..checkpoint import EMBEDDING, Checkpoint
from ..config import DecoderConfig
from ..decoder import build_segment, load_parameter, segment_kind
from ..matrix_kinds import MatrixKinds
from ..onnx.matmul_nbits import quantise
from ..rounding import Calibration, Compensator
from ..weights import WeightFile, to_half
from ..written import Written
from .lower import lower, materialise, require_executorch
from .program import ProgramBuilder, find_constant
from .rounded import compensating, rounded_products
from .weights import Constant, matrix_constants, quantised_constants, vector_constants

PROGRAM = "model.pte"
EMBEDDING_FILE = "embedding.bin"
#: What the rows of an output head are to who looks them up, by the kind of weights.
HEAD_ROWS = {"fp32": "float32", "int8": "int8_row", "int4": "int4_bfloat16"}

Step = Callable[[str], None]


def write_graphs(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    form: str,
    kinds: MatrixKinds,
    page_size: int,
    calibration: Calibration | None,
    step: Step,
    operators: str = "xnnpack",
) -> Written:
    """Write the program into ``folder``; see :func:`edgekv.export.onnx.graphs.write_graphs`.

    Args:
        calibration: what int4 weights are rounded with; None: each to the nearest code.
        operators: one of :data:`edgekv.contract.OPERATORS`.

    Raises:
        EngineMissing: executorch or torchao is not installed. UsageError: the weight kind or the form cannot be had.
    """
    require_executorch()
    weights = kinds.most
    if kinds.mixed:
        name = next(name for name, kind in kinds.others.items() if kind != weights)
        raise UsageError(
            f"ExecuTorch programs hold all matrices in one kind, and {name} is to be {kinds.of(name)} among {weights}; use"
            " --engine onnx"
        )
    if weights == "fp16":
        raise UsageError("XNNPACK computes fp16 weights in float32; choose --weights int4, int8 or fp32")
    if operators == "edgekv" and (form, weights) != ("split", "int4"):
        raise UsageError("--operators edgekv is for --form split with --weights int4")
    config = checkpoint.config
    step("tracing the decoder")
    if form == "inline":
        from .inline import write_inline

        write_inline(checkpoint, folder / PROGRAM, weights, page_size, compensating(checkpoint, calibration, head=True))
        return Written((PROGRAM,))
    # The rows of a tied head are looked up, too, so they stay what they were.
    compensator = compensating(checkpoint, calibration, head=not config.model.tied_embeddings)
    with _split_builder(config, weights, folder, operators) as builder:
        for index in range(config.model.n_layers + 1):
            step(f"segment {index} of {config.model.n_layers}")
            kind = segment_kind(config, index)
            constants = _load_segment(checkpoint, index, weights, compensator)
            named = {f"{kind}/{name}": value for name, value in constants.items()}
            for rows in segment_rows(config, index):
                builder.add(executorch_method(kind, rows), executorch_method(f"segment_{index}", rows), named)
        step("embedding")
        builder.save(folder / PROGRAM)
    if config.model.tied_embeddings and weights in HEAD_ROWS:
        return Written((PROGRAM,), _head_rows(folder / PROGRAM, constants["head.weight"], HEAD_ROWS[weights]))
    return Written((PROGRAM,), write_embedding(checkpoint, folder, weights))


def count_steps(checkpoint: Checkpoint) -> int:
    """Return how often :func:`write_graphs` calls ``step``."""
    return checkpoint.config.model.n_layers + 3


def segment_rows(config: DecoderConfig, index: int) -> tuple[int, ...]:
    """Return the numbers of rows for which segment ``index`` has a method."""
    return EXECUTORCH_HEAD_ROWS if index == config.model.n_layers else EXECUTORCH_ROWS


def write_embedding(checkpoint: Checkpoint, folder: Path, weights: str) -> EmbeddingSpec:
    """Write the table that the runtime looks rows up in: float32, or INT8 with a scale per 32 channels."""
    table = checkpoint.tensor(EMBEDDING).numpy()
    with WeightFile(folder / EMBEDDING_FILE) as file:
        if weights == "fp32":
            return EmbeddingSpec(EMBEDDING_FILE, "float32", file.put(table).offset)
        if table.shape[1] % 32:
            return EmbeddingSpec(EMBEDDING_FILE, "float16", file.put(to_half(table, EMBEDDING)).offset)
        quantised = quantise(table, 8, symmetric=True)
        return EmbeddingSpec(
            EMBEDDING_FILE, "int8", file.put(quantised.codes).offset, file.put(quantised.scales).offset
        )


def _head_rows(program: Path, head: list[Constant], dtype: str) -> EmbeddingSpec:
    """Return where the rows of a tied output head lie in the program, so that the embedding need not be stored again."""
    rows, *scales = (find_constant(program, constant) for constant in head)
    return EmbeddingSpec(program.name, dtype, rows, scales[0] if scales else 0)


def _split_builder(config: DecoderConfig, weights: str, folder: Path, operators: str) -> ProgramBuilder:
    """Lower one segment of each kind, for each number of rows."""
    methods, parameters = {}, {}
    done = set()
    for index in range(config.model.n_layers + 1):
        kind = segment_kind(config, index)
        if kind in done:
            continue
        done.add(kind)
        segment = build_segment(config, index)
        module, constants = materialise(segment, f"segment_{index}", weights, len(done), operators)
        parameters.update({f"{kind}/{name}": value for name, value in constants.items()})
        for rows in segment_rows(config, index):
            example = tuple(
                torch.zeros(*(rows if dim == "T" else int(dim) for dim in tensor.shape))
                for tensor in segment_spec(config.model, index).inputs
            )
            methods[executorch_method(kind, rows)] = (module, example, None)
    return ProgramBuilder(lower(methods, operators=operators), parameters, folder)


def _load_segment(
    checkpoint: Checkpoint, index: int, weights: str, compensator: Compensator | None
) -> dict[str, list[Constant]]:
    """Read a segment's parameters as constants."""
    segment = build_segment(checkpoint.config, index)
    rounded = rounded_products(checkpoint, index, segment, compensator)
    result = {}
    for name, parameter in segment.named_parameters():
        path = name.removesuffix(".weight")
        if path in rounded:
            result[name] = quantised_constants(rounded[path], weights)
            continue
        value = load_parameter(checkpoint, index, name)
        result[name] = matrix_constants(value, weights) if parameter.ndim == 2 else vector_constants(value)
    return result
