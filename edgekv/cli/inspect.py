"""`edgekv inspect`: what a bundle holds, and whether it is whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from edgekv import settings
from edgekv.bundle import Manifest, SamplingSpec, bits, check_files, read_manifest
from edgekv.contract import GraphSpec, TensorSpec, segment_spec
from edgekv.sizes import format_bytes, format_count

from .options import argument
from .output import Facts, print_json, stdout
from .sampling import described


def inspect_command(
    bundle: Annotated[Path, argument(settings.BUNDLE, "BUNDLE", help="A folder made by `edgekv export`.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file and compare with the manifest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a bundle's geometry, its I/O contract, its files and what a token costs in the cache.

    Examples:
    `edgekv inspect demo.edgekv`

    `edgekv inspect demo.edgekv --verify`

    `edgekv inspect demo.edgekv --json | jq .kv_bytes_per_token`
    """
    manifest = read_manifest(bundle)
    if verify:
        check_files(bundle, manifest)
    facts = {**manifest.to_json(), "kv_bytes_per_token": kv_bytes_per_token(manifest)}
    if as_json:
        print_json({**facts, "verified": verify})
        return
    console = stdout()
    _geometry(manifest).print(console)
    console.print()
    console.print(_contract(manifest))
    console.print(_files(manifest))
    if verify:
        console.print("all files match their sha256")


def kv_bytes_per_token(manifest: Manifest) -> dict[str, float]:
    """Return what one token of context takes in the cache, all layers: fp16, and INT8 with its scales."""
    spec = manifest.model.pages(manifest.page_size)
    per_token = spec.n_layers / spec.page_size
    return {"fp16": spec.hot_bytes * per_token, "int8": spec.warm_bytes * per_token}


def graph_specs(manifest: Manifest) -> list[tuple[str, GraphSpec]]:
    """Return the distinct contracts of the bundle's graphs with the files that keep them."""
    model, graphs = manifest.model, manifest.graphs
    if manifest.form == "inline":
        return [(graphs[0], manifest.inline_spec())]
    if len(graphs) == 1:  # one program with a method per segment
        graphs = tuple(f"segment_{index}" for index in range(model.n_layers + 1))
    rows = [(graphs[0], segment_spec(model, 0))]
    if model.n_layers > 1:
        span = graphs[1] if model.n_layers == 2 else f"{graphs[1]} .. {graphs[-2]}"
        rows.append((span, segment_spec(model, 1)))
    return [*rows, (graphs[-1], segment_spec(model, model.n_layers))]


def _geometry(manifest: Manifest) -> Facts:
    model, cost = manifest.model, kv_bytes_per_token(manifest)
    windows = sorted(set(model.windows) - {0})
    rows = [
        ("model", f"{model.architecture}, {model.n_layers} layers, hidden {model.hidden_size}, MLP {model.intermediate_size}"),
        ("attention", f"{model.n_q_heads} query heads, {model.n_kv_heads} KV heads, head_dim {model.head_dim}"),
        ("sliding window", ", ".join(map(str, windows)) if windows else "none"),
        ("vocabulary", f"{model.vocab_size}, {'tied' if model.tied_embeddings else 'untied'} embeddings"),
        ("context", f"{model.max_context} tokens"),
        ("engine", f"{manifest.engine}, {manifest.form} form, weights {manifest.weights}"),
        *([("matrices", matrices)] if (matrices := _matrices(manifest)) else []),
        ("pages", f"{manifest.page_size} tokens"),
        ("cache per token", f"{format_bytes(cost['fp16'])} in fp16, {format_bytes(cost['int8'])} in INT8"),
        ("pinned", "the first page, the recent ones, and what `edgekv run --pin-prompt` names"),
        ("checkpoint", f"sha256 {manifest.source_sha256}"),
        ("chat template", manifest.chat_template or "none"),
        ("sampling", f"{described(manifest.sampling or SamplingSpec())}, where it chats"),
        ("versions", f"format {manifest.format_version}, contract {manifest.contract_version}, edgekv {manifest.edgekv_version}"),
    ]  # fmt: skip
    facts = Facts()
    for name, value in rows:
        facts.add_row(name, escape(value))
    return facts


def _matrices(manifest: Manifest) -> str:
    kinds = manifest.matrices_by_kind()
    parts = [f"{format_count(facts['weights'])} in {kind} ({bits(facts):.2f} bits)" for kind, facts in kinds.items()]
    if len(parts) > 1:
        parts[-1] += f": {bits(*kinds.values()):.2f} bits a weight"
    return ", ".join(parts)


def _contract(manifest: Manifest) -> Table:
    table = Table("graph", "in/out", "name", "type", "shape", "meaning", box=box.SIMPLE_HEAD)
    for file, spec in graph_specs(manifest):
        table.add_section()
        for direction, tensors in (("in", spec.inputs), ("out", spec.outputs)):
            for tensor in _one_layer(tensors):
                shape = "[" + ", ".join(map(str, tensor.shape)) + "]"
                table.add_row(file, direction, tensor.name, tensor.dtype, escape(shape), escape(tensor.meaning))
                file = ""
    return table


def _one_layer(tensors: tuple[TensorSpec, ...]) -> list[TensorSpec]:
    """Keep layer 0 of the tensors that every layer has, for any layer: ``x.{l}`` with the sizes ``N{l}``."""
    kept = []
    for tensor in tensors:
        name, _, layer = tensor.name.partition(".")
        if not layer:
            kept.append(tensor)
        elif layer == "0":
            shape = tuple(_any_layer(size) if isinstance(size, str) else size for size in tensor.shape)
            kept.append(TensorSpec(name + ".{l}", tensor.dtype, shape, _any_layer(tensor.meaning)))
    return kept


def _any_layer(text: str) -> str:
    """Write the symbols of layer 0 (``N0``, ``R0``) as those of any layer."""
    return re.sub(r"\b([A-Z])0\b", r"\1{l}", text)


def _files(manifest: Manifest) -> Table:
    table = Table("file", "size", "sha256", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for name, entry in manifest.files.items():
        table.add_row(escape(name), format_bytes(entry["bytes"]), entry["sha256"][:16])
    return table
