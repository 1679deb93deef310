"""Runs a bundle with NumPy and ONNX Runtime alone: small, slow, and independent of the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from edgekv.bundle import EmbeddingSpec, Manifest, read_manifest
from edgekv.codec import quantise_keys, quantise_values
from edgekv.contract import segment_spec
from edgekv.export.checkpoint import EMBEDDING, open_checkpoint
from edgekv.export.decoder import build_segment, load_parameter
from edgekv.seam import PageView, paged_attention
from edgekv.spec import RopeSpec
from tests.sessions import session_options

Float = NDArray[np.float32]


def open_session(path: Path) -> ort.InferenceSession:
    """Open one graph with two threads."""
    return ort.InferenceSession(path, session_options(), providers=["CPUExecutionProvider"])


def rope_tables(rope: RopeSpec, positions: NDArray[np.int64]) -> tuple[Float, Float]:
    """Return cos and sin [T, rotary_dim / 2] in float32."""
    angles = positions.astype(np.float32)[:, None] * np.array(rope.inv_freq, np.float32)
    scaling = np.float32(rope.attention_scaling)
    return np.cos(angles) * scaling, np.sin(angles) * scaling


def embedding_rows(folder: Path, spec: EmbeddingSpec, vocab: int, hidden: int, tokens: NDArray[np.int64]) -> Float:
    """Look up embedding rows as the manifest describes them."""
    file = folder / spec.file
    if spec.dtype in ("float32", "float16"):
        table = np.memmap(file, spec.dtype, "r", spec.offset, (vocab, hidden))
        rows: Float = table[tokens].astype(np.float32)
        return rows
    bits = {"int8": 8, "int4": 4}[spec.dtype]
    codes = np.memmap(file, np.uint8, "r", spec.offset, (vocab, hidden * bits // 8))[tokens]
    scales = np.memmap(file, np.float32, "r", spec.scales_offset, (vocab, hidden // 32))[tokens]
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(tokens.size, hidden)
    values: Float = (codes.astype(np.float32) - 2 ** (bits - 1)) * np.repeat(scales, 32, axis=1)
    return values


class SplitDriver:
    """Steps the segments with the NumPy seam between them; the cache is a list of arrays per layer."""

    def __init__(self, folder: Path) -> None:
        self.manifest: Manifest = read_manifest(folder)
        self.folder, self.model = folder, self.manifest.model
        self.segments = [open_session(folder / name) for name in self.manifest.graphs]
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys: list[list[Float]] = [[] for _ in range(self.model.n_layers)]
        self.values: list[list[Float]] = [[] for _ in range(self.model.n_layers)]
        self.length = 0

    def step(self, tokens: list[int]) -> Float:
        """Feed tokens; returns logits [T, vocab]."""
        model, ids = self.model, np.array(tokens, np.int64)
        positions = np.arange(self.length, self.length + ids.size)
        tables = [rope_tables(rope, positions) for rope in model.ropes]
        feed: dict[str, Any] = {"residual": self._rows(ids)}
        for layer in range(model.n_layers):
            feed["cos"], feed["sin"] = tables[model.rope_of(layer)]
            got = self._run(layer, feed)
            feed["residual"] = got.get("next_residual", feed["residual"])
            feed["attention"] = self._attend(layer, got["q"], got["k"], got["v"], positions)
        self.length += ids.size
        return self._run(model.n_layers, feed)["logits"]

    def _rows(self, ids: NDArray[np.int64]) -> Float:
        assert self.manifest.embedding is not None
        model = self.model
        return embedding_rows(self.folder, self.manifest.embedding, model.vocab_size, model.hidden_size, ids)

    def _run(self, index: int, feed: dict[str, Any]) -> dict[str, Float]:
        segment = self.segments[index]
        names = [output.name for output in segment.get_outputs()]
        inputs = {value.name: feed[value.name] for value in segment.get_inputs()}
        return dict(zip(names, segment.run(names, inputs), strict=True))

    def _attend(self, layer: int, q: Float, k: Float, v: Float, positions: NDArray[np.int64]) -> Float:
        pages, start = [], 0
        for keys, values in zip(self.keys[layer], self.values[layer], strict=True):
            size = keys.shape[0]
            old = np.arange(start, start + size)
            pages.append(PageView(keys.transpose(1, 0, 2), values.transpose(1, 0, 2), np.ones(size, bool), old))
            start += size
        model = self.model
        scale, softcap, window = model.softmax_scale, model.softcap, model.windows[layer]
        out, _ = paged_attention(q, k, v, pages, positions, scale=scale, softcap=softcap, window=window)
        self.keys[layer].append(k)
        self.values[layer].append(v)
        return out


class EagerDriver(SplitDriver):
    """The split form without an engine: the modules that exporters trace, run by torch."""

    def __init__(self, source: Path) -> None:
        checkpoint = open_checkpoint(source)
        self.model, self.table = checkpoint.config.model, checkpoint.tensor(EMBEDDING)
        self.modules = []
        for index in range(self.model.n_layers + 1):
            module = build_segment(checkpoint.config, index).to_empty(device="cpu").requires_grad_(False)
            for name, parameter in module.named_parameters():
                parameter.copy_(load_parameter(checkpoint, index, name))
            self.modules.append(module)
        self.reset()

    def _rows(self, ids: NDArray[np.int64]) -> Float:
        rows: Float = self.table[torch.from_numpy(ids)].numpy()
        return rows

    def _run(self, index: int, feed: dict[str, Any]) -> dict[str, Float]:
        spec = segment_spec(self.model, index)
        results = self.modules[index](*(torch.from_numpy(feed[tensor.name]) for tensor in spec.inputs))
        results = results if isinstance(results, tuple) else (results,)
        return {tensor.name: result.numpy() for tensor, result in zip(spec.outputs, results, strict=True)}


class InlineDriver:
    """Steps the one graph. ``quantised``: full pages are handed over as INT8, the rest as recent tokens."""

    def __init__(self, folder: Path, *, quantised: bool = False) -> None:
        self.manifest = read_manifest(folder)
        self.model, self.quantised = self.manifest.model, quantised
        self.session = open_session(folder / self.manifest.graphs[0])
        shape = (0, self.model.n_kv_heads, self.model.head_dim)
        self.keys = [np.zeros(shape, np.float32) for _ in range(self.model.n_layers)]
        self.values = [np.zeros(shape, np.float32) for _ in range(self.model.n_layers)]
        self.length = 0
        self.page_mass: list[Float] = []

    def step(self, tokens: list[int]) -> Float:
        """Feed tokens; returns logits [T, vocab]."""
        ids = np.array(tokens, np.int64)
        positions = np.arange(self.length, self.length + ids.size)
        feed: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "logits_rows": np.arange(ids.size)}
        for layer in range(self.model.n_layers):
            feed.update(self._cache(layer))
        names = [output.name for output in self.session.get_outputs()]
        got = dict(zip(names, self.session.run(names, feed), strict=True))
        for layer in range(self.model.n_layers):
            self.keys[layer] = np.concatenate([self.keys[layer], got[f"new_keys.{layer}"]])
            self.values[layer] = np.concatenate([self.values[layer], got[f"new_values.{layer}"]])
        self.page_mass = [got[f"page_mass.{layer}"] for layer in range(self.model.n_layers)]
        self.length += ids.size
        logits: Float = got["logits"]
        return logits

    def _cache(self, layer: int) -> dict[str, Any]:
        size, kv, dim = self.manifest.page_size, self.model.n_kv_heads, self.model.head_dim
        keys, values = self.keys[layer], self.values[layer]
        n_pages = self.length // size if self.quantised else 0
        k_codes = np.zeros((n_pages, kv, dim, size), np.int8)
        k_scales = np.zeros((n_pages, kv, dim), np.float16)
        v_codes = np.zeros((n_pages, kv, size, dim), np.int8)
        v_scales = np.zeros((n_pages, kv, size), np.float16)
        for page in range(n_pages):
            span = slice(page * size, (page + 1) * size)
            codes, k_scales[page] = quantise_keys(keys[span])
            k_codes[page] = codes.transpose(1, 2, 0)
            codes, scales = quantise_values(values[span])
            v_codes[page], v_scales[page] = codes.transpose(1, 0, 2), scales.T
        rest = slice(n_pages * size, None)
        return {
            f"key_pages.{layer}": k_codes,
            f"key_scales.{layer}": k_scales,
            f"value_pages.{layer}": v_codes,
            f"value_scales.{layer}": v_scales,
            f"recent_keys.{layer}": keys[rest].astype(np.float16),
            f"recent_values.{layer}": values[rest].astype(np.float16),
            f"page_positions.{layer}": np.arange(n_pages * size).reshape(-1, size),
            f"recent_positions.{layer}": np.arange(n_pages * size, self.length),
        }
