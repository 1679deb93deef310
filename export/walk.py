"""Texts that go through a checkpoint's decoder in float32, segment by segment: memory holds one segment and hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .checkpoint import EMBEDDING, Checkpoint
from .decoder import build_segment, load_parameter
from .positions import Positions

Tensor = torch.Tensor
#: Queries that attend at a time: their scores fit into memory, however long the text is.
_QUERIES = 512


@dataclass
class Stream:
    """Where a text has come to: residual [T, hidden], attention of the last layer [T, heads, head_dim]."""

    residual: Tensor
    attention: Tensor | None = None

    def rows(self, rows: slice) -> list[Tensor]:
        """Return what a segment meets in these rows, without cosines and sines."""
        return [self.residual[rows]] if self.attention is None else [self.residual[rows], self.attention[rows]]


class Walk:
    """Texts on their way through a decoder.

    Attributes:
        segment: the number of the segment that comes next.
        streams: the texts, as that segment meets them.
    """

    def __init__(self, checkpoint: Checkpoint, texts: Sequence[Sequence[int]]) -> None:
        self._checkpoint = checkpoint
        embedding = checkpoint.tensor(EMBEDDING)
        self.segment = 0
        self.streams = [Stream(embedding[list(text)]) for text in texts]
        self._turned = Positions(checkpoint.config.model).turned(torch.arange(max(map(len, texts))))

    def load(self, index: int | None = None, *, head: bool = True) -> nn.Module:
        """Read a segment, without ``index`` the one that comes next; without ``head``, the last gives what the head meets."""
        index = self.segment if index is None else index
        segment = build_segment(self._checkpoint.config, index)
        if not head and index == self._checkpoint.config.model.n_layers:
            segment.head = nn.Identity()
        segment = segment.to_empty(device="cpu").requires_grad_(False)
        for name, parameter in segment.named_parameters():
            parameter.copy_(load_parameter(self._checkpoint, index, name))
        return segment

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def advance(self, segment: nn.Module) -> None:
        """Bring the texts through a segment and the attention behind it; there is none behind the last."""
        if self.segment < self._checkpoint.config.model.n_layers:
            self.streams = self.behind(self.segment, segment, self.streams)
        else:
            segment(*_rows(self.streams))
        self.segment += 1

    def behind(self, index: int, segment: nn.Module, streams: Sequence[Stream]) -> list[Stream]:
        """Return texts behind segment ``index``, which they go through all at once, and the attention after it."""
        model, lengths = self._checkpoint.config.model, [len(stream.residual) for stream in streams]
        turned = (torch.cat([part[:length] for length in lengths]) for part in self._turned[model.rope_of(index)])
        *residual, q, k, v = (rows.split(lengths) for rows in segment(*_rows(streams), *turned))
        before = residual[0] if residual else [stream.residual for stream in streams]
        return [Stream(rows, self._attend(index, *parts)) for rows, *parts in zip(before, q, k, v, strict=True)]

    def _attend(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        model = self._checkpoint.config.model
        window = model.windows[index] or len(q)
        k, v = (part.repeat_interleave(model.n_q_heads // model.n_kv_heads, 1).transpose(0, 1) for part in (k, v))
        parts = []
        for start in range(0, len(q), _QUERIES):
            stop = min(start + _QUERIES, len(q))
            first = max(0, start - window + 1)
            distance = torch.arange(start, stop)[:, None] - torch.arange(first, stop)[None, :]
            seen = (distance >= 0) & (distance < window)
            asked, keys, values = q[start:stop].transpose(0, 1), k[:, first:stop], v[:, first:stop]
            if model.softcap:
                scores = model.softcap * torch.tanh(
                    asked @ keys.transpose(1, 2) * (model.softmax_scale / model.softcap)
                )
                attended = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1) @ values
            else:
                attended = nn.functional.scaled_dot_product_attention(
                    asked, keys, values, attn_mask=seen, scale=model.softmax_scale
                )
            parts.append(attended.transpose(0, 1))
        return torch.cat(parts)


def _rows(streams: Sequence[Stream]) -> list[Tensor]:
    """Return what a segment meets of texts, one below the other."""
    return [torch.cat(parts) for parts in zip(*(stream.rows(slice(None)) for stream in streams), strict=True)]


class SourceRun:
    """One text, read by a checkpoint itself in float32.

    Args:
        step: called with the layers that are done, and all of them.
    """

    def __init__(
        self, checkpoint: Checkpoint, tokens: Sequence[int], step: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        n_layers = checkpoint.config.model.n_layers
        walk = Walk(checkpoint, [tokens])
        for index in range(n_layers):
            walk.advance(walk.load())
            step(index + 1, n_layers)
        self._stream, self._last = walk.streams[0], walk.load()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def logits(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the logits behind tokens [start, stop), float32 [stop - start, vocab_size]."""
        logits: NDArray[np.float32] = self._last(*self._stream.rows(slice(start, stop))).numpy()
        return logits
