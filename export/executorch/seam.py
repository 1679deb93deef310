"""The attention seam of the inline form in operations that ExecuTorch has.

The meaning is :func:`edgekv.seam.paged_attention`. A token alone (:class:`DecodeSeam`) reads pages as codes: scales belong to the
query and to the probabilities. Several tokens (:class:`PrefillSeam`) decode the cache once for all of them. Every number of pages
and of recent tokens may be zero at run time, in each layer for itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from edgekv.spec import ModelSpec

Tensor = torch.Tensor

#: Stands for minus infinity in a masked score: far below any real score, and a row of them still gives no NaN.
MASKED = -1e30


class Cache(NamedTuple):
    """The cache of a layer, as :data:`edgekv.contract.INLINE_CACHE` lists it."""

    key_pages: Tensor
    key_scales: Tensor
    value_pages: Tensor
    value_scales: Tensor
    page_positions: Tensor
    recent_keys: Tensor
    recent_values: Tensor
    recent_positions: Tensor


class _Prepared(NamedTuple):
    """The cache without what lies where no token is: anything may lie there, even NaN, and 0 * NaN is NaN.

    [..., S] lists pages first, then recent tokens.
    """

    #: [N, n_kv_heads, head_dim] and [N, n_kv_heads, page_size] float32.
    key_scales: Tensor
    value_scales: Tensor
    #: [R + T, n_kv_heads, head_dim] float32: recent tokens and new ones.
    tail_keys: Tensor
    tail_values: Tensor
    #: [T or 1, S] float32: 0 where a slot is seen, MASKED elsewhere.
    bias: Tensor


class Seam(nn.Module):
    """One layer's seam: what both ways have in common.

    Takes q [T, n_q_heads, head_dim], k and v [T, n_kv_heads, head_dim], the layer's :class:`Cache`, position_ids [T] and causal
    [T, T] bool. Gives attention [T, n_q_heads, head_dim] and page_mass [N].
    """

    def __init__(self, model: ModelSpec, window: int) -> None:
        super().__init__()
        self.kv, self.dim, self.group = model.n_kv_heads, model.head_dim, model.n_q_heads // model.n_kv_heads
        self.scale, self.softcap, self.window = model.softmax_scale, model.softcap, window

    def prepare(self, k: Tensor, v: Tensor, cache: Cache, position_ids: Tensor) -> _Prepared:
        """Return what both ways read."""
        held, recent_held = cache.page_positions >= 0, cache.recent_positions >= 0
        seen = torch.cat([held.reshape(-1), recent_held]).unsqueeze(0)
        if self.window:
            positions = torch.cat([cache.page_positions.reshape(-1), cache.recent_positions])
            seen = seen & (positions.unsqueeze(0) > (position_ids - self.window).unsqueeze(1))
        n_recent = recent_held.shape[0]
        order = torch.where(recent_held, torch.arange(n_recent), n_recent)
        return _Prepared(
            _kept(held.any(dim=1)[:, None, None], cache.key_scales),
            _kept(held.unsqueeze(1), cache.value_scales),
            torch.cat([_rows(cache.recent_keys, order), k]),
            torch.cat([_rows(cache.recent_values, order), v]),
            torch.where(seen, 0.0, MASKED),
        )

    def capped(self, scores: Tensor) -> Tensor:
        """Return scores as the model caps them."""
        return self.softcap * torch.tanh(scores * (1 / self.softcap)) if self.softcap else scores

    def mass(self, weights: Tensor, cache: Cache) -> Tensor:
        """Return page_mass from the mean weights [n_pages * page_size] of the slots of pages."""
        return weights.reshape(cache.page_positions.shape).sum(dim=1)


class DecodeSeam(Seam):
    """The seam of exactly one new token."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Cache, position_ids: Tensor, causal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend; see the class."""
        del causal  # it sees itself
        ready = self.prepare(k, v, cache, position_ids)
        n_pages, page_size = cache.page_positions.shape
        n_slots = n_pages * page_size
        query = (q * self.scale).reshape(self.kv, self.group, self.dim)
        scaled = query.unsqueeze(0) * ready.key_scales.unsqueeze(2)
        scores = torch.bmm(scaled.flatten(0, 1), dequantise(cache.key_pages).flatten(0, 1))
        scores = scores.reshape(n_pages, self.kv, self.group, page_size).permute(1, 2, 0, 3)
        scores = scores.reshape(self.kv, self.group, n_slots)
        tail = torch.bmm(query, ready.tail_keys.permute(1, 2, 0))
        bias = torch.cat([ready.bias, torch.zeros(1, 1)], dim=1)
        weights = torch.softmax(self.capped(torch.cat([scores, tail], dim=2)) + bias, dim=-1)
        paged, rest = weights[..., :n_slots], weights[..., n_slots:]
        shares = paged.reshape(self.kv, self.group, n_pages, page_size).permute(2, 0, 1, 3)
        shares = (shares * ready.value_scales.unsqueeze(2)).flatten(0, 1)
        of_pages = torch.bmm(shares, dequantise(cache.value_pages).flatten(0, 1))
        of_pages = of_pages.reshape(n_pages, self.kv, self.group, self.dim).sum(dim=0)
        attention = of_pages + torch.bmm(rest, ready.tail_values.permute(1, 0, 2))
        mass = self.mass(paged.mean(dim=(0, 1)), cache)
        return attention.reshape(1, self.kv * self.group, self.dim), mass


class PrefillSeam(Seam):
    """The seam of any number of new tokens."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Cache, position_ids: Tensor, causal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend; see the class."""
        ready = self.prepare(k, v, cache, position_ids)
        n_new, (n_pages, page_size) = q.shape[0], cache.page_positions.shape
        n_slots, kv, group, dim = n_pages * page_size, self.kv, self.group, self.dim
        query = (q * self.scale).reshape(n_new, kv, group, dim).permute(1, 2, 0, 3).reshape(kv, group * n_new, dim)
        keys = dequantise(cache.key_pages) * ready.key_scales.unsqueeze(3)
        keys = torch.cat([keys.permute(1, 2, 0, 3).reshape(kv, dim, n_slots), ready.tail_keys.permute(1, 2, 0)], dim=2)
        values = dequantise(cache.value_pages) * ready.value_scales.unsqueeze(3)
        values = values.permute(1, 0, 2, 3).reshape(kv, n_slots, dim)
        values = torch.cat([values, ready.tail_values.permute(1, 0, 2)], dim=1)
        own = torch.where(causal, 0.0, MASKED)
        bias = torch.cat([ready.bias.expand(n_new, -1), own], dim=1)
        scores = torch.bmm(query, keys).reshape(kv, group, n_new, keys.shape[2])
        weights = torch.softmax(self.capped(scores) + bias, dim=-1)
        attention = torch.bmm(weights.reshape(kv, group * n_new, keys.shape[2]), values)
        attention = attention.reshape(kv, group, n_new, dim).permute(2, 0, 1, 3).reshape(n_new, kv * group, dim)
        return attention, self.mass(weights.mean(dim=(0, 1, 2))[:n_slots], cache)


def dequantise(codes: Tensor) -> Tensor:
    """Return INT8 codes as float32 by an operation that the delegate takes: a cast would run outside of it, 30 times slower."""
    import torch.ao.quantization.fx._decomposed  # defines the operator

    result: Tensor = torch.ops.quantized_decomposed.dequantize_per_tensor.default(codes, 1.0, 0, -128, 127, torch.int8)
    return result


def _kept(held: Tensor, values: Tensor) -> Tensor:
    """Return values float16 as float32, and 0 where nothing is held."""
    return torch.where(held, values.to(torch.float32), 0.0)


def _rows(values: Tensor, order: Tensor) -> Tensor:
    """Return rows of values float16 as float32, in an order in which the row behind the last stands for zeros.

    Whole rows are copied many times faster than a choice is made for every number.
    """
    nothing = torch.zeros(1, *values.shape[1:], dtype=values.dtype)
    return torch.index_select(torch.cat([values, nothing]), 0, order).to(torch.float32)
