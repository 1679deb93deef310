"""Embedding rows are what the manifest says that they are: each layout against a plain reading of the whole table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgekv.bundle import EMBEDDING_LAYOUTS, EmbeddingSpec
from edgekv.runtime.decoder.embedding import Embedding
from tests.export.contract_page import MODEL

VOCAB, HIDDEN = 37, 96


def stored(dtype: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return random codes (or rows) and scales, as they are stored."""
    generator = torch.Generator().manual_seed(3)
    if dtype in ("float32", "float16"):
        return torch.randn(VOCAB, HIDDEN, generator=generator).to(getattr(torch, dtype)), None
    width = HIDDEN // 2 if dtype.startswith("int4") else HIDDEN
    codes = torch.randint(0, 256, (VOCAB, width), generator=generator).to(torch.uint8)
    scales = torch.rand(VOCAB, 1 if dtype == "int8_row" else HIDDEN // 32, generator=generator) + 0.1
    if dtype == "int8_row":
        return codes.view(torch.int8), scales
    return codes, scales.to(torch.bfloat16) if dtype == "int4_bfloat16" else scales


def decoded(codes: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Return the table [VOCAB, HIDDEN] float32 by the words of docs/contract.md."""
    if scales is None:
        return codes.float()
    if codes.shape[1] < HIDDEN:
        numbers = torch.stack([codes & 15, codes >> 4], dim=2).reshape(VOCAB, HIDDEN).float() - 8
    else:
        numbers = codes.float() - (128 if codes.dtype == torch.uint8 else 0)
    return numbers * scales.float().repeat_interleave(HIDDEN // scales.shape[1], dim=1)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", EMBEDDING_LAYOUTS)
def test_a_row_is_what_its_layout_says(dtype: str, tmp_path: Path) -> None:
    codes, scales = stored(dtype)
    model = replace(MODEL, vocab_size=VOCAB, hidden_size=HIDDEN)
    start, more = b"\xff" * 5, b"" if scales is None else raw(scales)
    spec = EmbeddingSpec("rows.bin", dtype, len(start), len(start) + len(raw(codes)) if more else 0)
    (tmp_path / "rows.bin").write_bytes(start + raw(codes) + more)
    assert spec.end_bytes(VOCAB, HIDDEN) == (tmp_path / "rows.bin").stat().st_size
    tokens = np.array([0, VOCAB - 1, 5, 5, 17])
    rows: NDArray[np.float32] = np.full((len(tokens), HIDDEN), np.nan, np.float32)
    Embedding(tmp_path, spec, model).look_up(tokens, rows)
    np.testing.assert_array_equal(rows, decoded(codes, scales).numpy()[tokens])
