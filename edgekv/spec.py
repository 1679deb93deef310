"""The geometry of a model and of its pages: every byte count in edgekv is derived here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from msgspec import Meta

from edgekv.errors import FormatError, UsageError
from edgekv.schema import Finite, Natural, Positive, PositiveFinite

#: Alignment of a record on flash. O_DIRECT asks for the logical block size, 512 or 4096 bytes.
RECORD_ALIGN_BYTES = 4096
RECORD_HEADER_BYTES = 64
#: Of a record's header: what says which record it is, and from where on the checksum in it covers what follows.
RECORD_HEAD_BYTES, RECORD_CHECKED_FROM = 36, 16
#: Alignment of a page in RAM: one cache line, one AVX-512 register.
PAGE_ALIGN_BYTES = 64
#: RAM of the process beyond weights and cache: interpreter, libraries, activations. Measured on Linux x86-64; see README.
RUNTIME_OVERHEAD_BYTES = 160 * 1024 * 1024
#: Channels of a head that the kernels have room for.
MAX_HEAD_DIM = 256


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class PageSpec:
    """Shape of one page: ``page_size`` tokens of one layer, all KV heads.

    Memory layouts (C order). The interleaved INT8 layouts put what one dot-product instruction reads
    side by side, so that a kernel attends to a page where it lies:

    ======================  =========================================  =======
    part                    shape                                      dtype
    ======================  =========================================  =======
    HOT keys                [n_kv_heads, head_dim, page_size]          float16
    HOT values              [n_kv_heads, page_size, head_dim]          float16
    WARM keys               [n_kv_heads, head_dim/4, page_size, 4]     int8
    WARM values             [n_kv_heads, page_size/4, head_dim, 4]     int8
    WARM key scales         [n_kv_heads, head_dim]                     float16
    WARM value scales       [n_kv_heads, page_size]                    float16
    ======================  =========================================  =======

    A HOT page is its keys, then its values. A WARM page is keys, values, key scales, value scales.
    """

    n_layers: Annotated[Positive, Meta(description="layers")]
    n_kv_heads: Annotated[Positive, Meta(description="heads of keys and values")]
    head_dim: Annotated[Positive, Meta(description="channels of a head")]
    page_size: Annotated[Positive, Meta(description="tokens of a page")]

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_kv_heads", "head_dim", "page_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.head_dim % 4 or self.page_size % 4:
            raise UsageError(f"head_dim ({self.head_dim}) and page_size ({self.page_size}) must be multiples of 4")
        if self.head_dim > MAX_HEAD_DIM:
            raise UsageError(f"head_dim {self.head_dim} is above {MAX_HEAD_DIM}, which is the most that a page takes")
        if self.page_size > 128:
            raise UsageError(f"page_size {self.page_size} is above 128; use 16, 32, 64 or 128")
        if self.n_layers >= 1 << 16:
            raise UsageError(f"n_layers {self.n_layers} is above 65535, which is the most that a record can name")

    @cached_property
    def elements(self) -> int:
        """Number of key elements in a page (the values have as many)."""
        return self.n_kv_heads * self.page_size * self.head_dim

    @cached_property
    def hot_bytes(self) -> int:
        """Bytes of an fp16 page."""
        return 4 * self.elements

    @cached_property
    def warm_bytes(self) -> int:
        """Bytes of an INT8 page with its scales, without padding."""
        return 2 * self.elements + 2 * self.n_kv_heads * (self.head_dim + self.page_size)

    @cached_property
    def warm_slot_bytes(self) -> int:
        """Bytes that an INT8 page takes in the arena."""
        return round_up(self.warm_bytes, PAGE_ALIGN_BYTES)

    @cached_property
    def frame_bytes(self) -> int:
        """Bytes of an arena frame: it holds one HOT page or two WARM pages."""
        return max(round_up(self.hot_bytes, PAGE_ALIGN_BYTES), 2 * self.warm_slot_bytes)

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of one page on flash: header, INT8 payload, padding."""
        return round_up(RECORD_HEADER_BYTES + self.warm_bytes, RECORD_ALIGN_BYTES)

    def fp16_cache_bytes(self, n_tokens: int) -> int:
        """Bytes of a plain fp16 cache for ``n_tokens``, all layers: what ``--kv-budget 25%`` is a share of."""
        return 4 * self.n_layers * self.n_kv_heads * self.head_dim * n_tokens

    def to_json(self) -> dict[str, int]:
        """Return the fields as plain data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding with every scaling variant already folded in.

    ``inv_freq`` has ``rotary_dim / 2`` angles per position; channel ``i`` is rotated with channel
    ``i + rotary_dim / 2`` (the "half" layout of Hugging Face checkpoints). ``attention_scaling``
    multiplies cosine and sine.
    """

    inv_freq: Annotated[
        tuple[Finite, ...],
        Meta(description="radians per position, float32 numbers; channel `i` turns with channel `i + len(inv_freq)`"),
    ]
    attention_scaling: Annotated[PositiveFinite, Meta(description="multiplies cosine and sine")] = 1.0

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated; the rest pass through."""
        return 2 * len(self.inv_freq)


@dataclass(frozen=True)
class ModelSpec:
    """What the runtime must know of a decoder. ``windows[l]`` is 0 for full attention in layer l."""

    architecture: Annotated[str, Meta(description="the checkpoint's model type; nothing depends on it")]
    n_layers: Annotated[Positive, Meta(description="layers")]
    hidden_size: Annotated[Positive, Meta(description="channels of the residual stream")]
    n_q_heads: Annotated[Positive, Meta(description="query heads, a multiple of n_kv_heads")]
    n_kv_heads: Annotated[
        Positive, Meta(description="heads of keys and values; query head `h` reads `h // (n_q_heads / n_kv_heads)`")
    ]
    head_dim: Annotated[Positive, Meta(description="channels of a head: a multiple of 4, 256 at the most")]
    intermediate_size: Annotated[Positive, Meta(description="channels of the MLP")]
    vocab_size: Annotated[Positive, Meta(description="tokens: rows of the embedding, columns of the logits")]
    max_context: Annotated[Positive, Meta(description="tokens of a sequence at the most")]
    rope: Annotated[RopeSpec, Meta(description="the rotary position embedding")]
    softmax_scale: Annotated[PositiveFinite, Meta(description="multiplies the scores, usually `head_dim ** -0.5`")]
    windows: Annotated[tuple[Natural, ...], Meta(description="of each layer the tokens that it sees; 0: all of them")]
    sliding_rope: Annotated[
        RopeSpec | None, Meta(description="that of layers with a window; null: `rope` is of all layers")
    ] = None
    softcap: Annotated[
        Annotated[float, Meta(ge=0)],
        Meta(description="scores become `softcap * tanh(score / softcap)`; 0: they do not"),
    ] = 0.0
    mlp_matrices: Annotated[Literal[3, 2], Meta(description="of an MLP: 3 with a gate, 2 without")] = 3
    tied_embeddings: Annotated[bool, Meta(description="whether embedding and output head are one matrix")] = False
    bos_token_id: Annotated[Natural | None, Meta(description="the token that begins a text")] = None
    eos_token_ids: Annotated[
        tuple[Natural, ...], Meta(description="the tokens that end an answer: any of them, and none is part of it")
    ] = field(default=())

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The rotary embeddings of its layers: one, or that of layers with a window behind it."""
        return (self.rope,) if self.sliding_rope is None else (self.rope, self.sliding_rope)

    def rope_of(self, layer: int) -> int:
        """Return which of :attr:`ropes` a layer has."""
        return int(self.sliding_rope is not None and self.windows[layer] > 0)

    def pages(self, page_size: int) -> PageSpec:
        """Return the page geometry for this model."""
        return PageSpec(self.n_layers, self.n_kv_heads, self.head_dim, page_size)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        """Hold the fields against each other.

        Raises:
            FormatError: no decoder has this shape.
        """
        if len(self.windows) != self.n_layers:
            raise FormatError(f"model.windows has {len(self.windows)} entries for {self.n_layers} layers")
        if self.n_q_heads % self.n_kv_heads:
            raise FormatError(f"model.n_q_heads ({self.n_q_heads}) is no multiple of n_kv_heads ({self.n_kv_heads})")
        for name, rope in zip(("rope", "sliding_rope"), self.ropes, strict=False):
            if not 0 < rope.rotary_dim <= self.head_dim:
                raise FormatError(
                    f"model.{name}.inv_freq has {len(rope.inv_freq)} entries for heads of {self.head_dim} channels"
                )
