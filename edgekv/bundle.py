"""What an exported folder holds: graphs, weights, tokenizer, and a manifest that names and hashes them all.

``manifest.json`` is written last, so that a folder with a manifest is a whole bundle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

import edgekv
from edgekv.contract import (
    CONTRACT_VERSION,
    ENGINES,
    FORMS,
    IO,
    OPERATORS,
    SOURCE_CODES,
    WEIGHTS,
    GraphSpec,
    inline_spec,
)
from edgekv.errors import BundleError, FormatError, UsageError
from edgekv.files import make_own_folder, read_own, replace_own
from edgekv.schema import Bytes, Natural, Positive, checked, file_within, one_of, plain_json, plain_name, read_whole
from edgekv.spec import ModelSpec

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
#: The numbers by which a newer bundle is told: the field, what it counts, and up to which this edgekv understands.
VERSIONS = (
    ("format_version", "bundle format", FORMAT_VERSION),
    ("contract_version", "graph contract", CONTRACT_VERSION),
)


@dataclass(frozen=True)
class RowLayout:
    """How a row of the embedding is stored.

    ``bits`` a channel. Where they are codes, ``scale_bits`` of each scale and the ``block`` of channels that share one; None: all
    of the row.
    """

    bits: int
    scale_bits: int = 0
    block: int | None = None

    def scales(self, hidden_size: int) -> int:
        """Return how many scales a row has."""
        return (hidden_size // self.block if self.block else 1) if self.scale_bits else 0


#: By :attr:`EmbeddingSpec.dtype`.
EMBEDDING_LAYOUTS = {
    "float32": RowLayout(32),
    "float16": RowLayout(16),
    "int8": RowLayout(8, 32, 32),
    "int4": RowLayout(4, 32, 32),
    "int8_row": RowLayout(8, 32),
    "int4_bfloat16": RowLayout(4, 16, 32),
}

#: Of a weight of the output head, without scales, in bundles that do not say whether rows lie apart from it.
_HEAD_BITS = {"int4": 4, "int8": 8, "fp16": 16, "fp32": 32}


class FileFacts(TypedDict):
    """What the manifest says of one file."""

    bytes: Annotated[Bytes, Meta(description="its size")]
    sha256: Annotated[str, Meta(description="its SHA-256, in hexadecimal")]


class MatrixFacts(TypedDict):
    """What the manifest says of the matrices of one kind in one graph."""

    weights: Annotated[Bytes, Meta(description="how many weights they have")]
    bytes: Annotated[Bytes, Meta(description="their size, scales included")]


def bits(*parts: MatrixFacts) -> float:
    """Return the bits that a weight takes in these matrices, scales included."""
    return 8 * sum(part["bytes"] for part in parts) / sum(part["weights"] for part in parts)


@dataclass(frozen=True)
class EmbeddingSpec:
    """Where the runtime looks up the embedding rows of the split form.

    ``dtype``: ``float32``/``float16``: rows [vocab, hidden] at ``offset`` of ``file``. Others are codes with scales at
    ``scales_offset``:

    - ``int8``: codes [vocab, hidden] uint8, value (code - 128) * scale; ``int4``: codes [vocab, hidden / 2] uint8, low nibble
      first, value (code - 8) * scale. One float32 scale per 32 channels, [vocab, hidden / 32]: what MatMulNBits reads.
    - ``int8_row``: codes [vocab, hidden] int8, one float32 scale per row, [vocab]; ``int4_bfloat16``: like ``int4``, with
      bfloat16 scales: what XNNPACK and the operators of ours read from an ExecuTorch program.

    When the embedding is tied, ``file`` and the offsets are those of the output head, unless ``dtype`` is another one than the
    head's: an INT4 head has INT8 rows beside it.
    """

    file: Annotated[str, Meta(description="the file that holds the table")]
    dtype: Annotated[str, Meta(description="how a row is stored", extra_json_schema={"enum": [*EMBEDDING_LAYOUTS]})]
    offset: Annotated[Bytes, Meta(description="where row 0 begins, in bytes")]
    scales_offset: Annotated[Bytes, Meta(description="where the scales of codes begin, in bytes")] = 0
    apart: Annotated[
        bool | None,
        Meta(
            description="of a tied embedding, whether its rows are a second copy, which no product reads; null: where they have"
            " more bits than `weights`"
        ),
    ] = None

    @property
    def layout(self) -> RowLayout:
        """How a row is stored."""
        return EMBEDDING_LAYOUTS[self.dtype]

    def row_bytes(self, hidden_size: int) -> int:
        """Bytes of a row without its scales."""
        return hidden_size * self.layout.bits // 8

    def row_scale_bytes(self, hidden_size: int) -> int:
        """Bytes of a row's scales."""
        return self.layout.scales(hidden_size) * self.layout.scale_bits // 8

    def table_bytes(self, vocab_size: int, hidden_size: int) -> int:
        """Bytes of all rows and their scales."""
        return vocab_size * (self.row_bytes(hidden_size) + self.row_scale_bytes(hidden_size))

    def end_bytes(self, vocab_size: int, hidden_size: int) -> int:
        """Bytes that the file has at the least."""
        rows = self.offset + vocab_size * self.row_bytes(hidden_size)
        scales = self.row_scale_bytes(hidden_size)
        return max(rows, self.scales_offset + vocab_size * scales) if scales else rows


@dataclass(frozen=True)
class SamplingSpec:
    """How its makers let the model choose tokens where nobody says otherwise."""

    temperature: Annotated[float, Meta(ge=0, le=100, description="0 is greedy")] = 0.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1, description="only so many of the likeliest tokens; 0 is all")] = 0
    top_p: Annotated[float, Meta(gt=0, le=1, description="only the likeliest tokens up to this mass")] = 1.0
    repetition_penalty: Annotated[
        float, Meta(ge=0.01, le=100, description="above 1 makes tokens that were there before less likely")
    ] = 1.0


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``; ``edgekv/manifest.schema.json`` and the table in docs/contract.md are made from it.

    ``special_tokens`` and what follows it up to ``prompt_end`` are None or empty in bundles of format 1.
    """

    engine: Annotated[str, Meta(description="what runs the graphs", extra_json_schema={"enum": [*ENGINES]})]
    form: Annotated[
        str, Meta(description="how the decoder is cut at its attention", extra_json_schema={"enum": [*FORMS]})
    ]
    weights: Annotated[str, Meta(description="how most weights are stored", extra_json_schema={"enum": [*WEIGHTS]})]
    page_size: Annotated[Positive, Meta(description="tokens of a page: a multiple of 4, 128 at the most")]
    model: Annotated[ModelSpec, Meta(description="the shape of the decoder")]
    graphs: Annotated[tuple[str, ...], Meta(description="the files of the graphs, in the order in which they run")]
    source_sha256: Annotated[
        str, Meta(description="identifies the checkpoint, whatever engine, form and weights: sessions are bound to it")
    ]
    tokenizer_sha256: Annotated[str, Meta(description="of the file `tokenizer`: sessions are bound to it")]
    embedding: Annotated[EmbeddingSpec | None, Meta(description="where the split form looks up the rows of tokens")] = (
        None
    )
    chat_template: Annotated[str | None, Meta(description="the file of the Jinja chat template, if there is one")] = (
        None
    )
    special_tokens: Annotated[
        dict[str, str] | None,
        Meta(description="tokens by the name that the chat template has for them: `bos_token` ..."),
    ] = None
    tokenizer: Annotated[
        str, Meta(description="the file of the tokenizer, in the format of the Hugging Face tokenizers library")
    ] = TOKENIZER
    bos_token: Annotated[str | None, Meta(description="the text of token `model.bos_token_id`")] = None
    eos_tokens: Annotated[
        tuple[str, ...], Meta(description="the texts of the tokens `model.eos_token_ids`, in the same order")
    ] = ()
    prompt_begin: Annotated[
        tuple[Natural, ...], Meta(description="what the tokenizer puts before the tokens of a prompt, such as BOS")
    ] = ()
    prompt_end: Annotated[tuple[Natural, ...], Meta(description="what it puts behind them, usually nothing")] = ()
    operators: Annotated[
        str | None,
        Meta(description="what an ExecuTorch program computes with", extra_json_schema={"enum": [*OPERATORS, None]}),
    ] = None
    io: Annotated[
        str, Meta(description="types of the cache's inputs in the inline form", extra_json_schema={"enum": [*IO]})
    ] = IO[0]
    sampling: Annotated[
        SamplingSpec | None,
        Meta(description="how a model that chats is sampled unless told otherwise; none: greedily"),
    ] = None
    source_codes: Annotated[
        str | None,
        Meta(
            description="what became of the codes of a quantised checkpoint: the bundle has them where blocks of 32 can hold"
            " them, or all were rounded anew; null: the checkpoint holds floats",
            extra_json_schema={"enum": [*SOURCE_CODES, None]},
        ),
    ] = None
    matrices: Annotated[
        dict[str, dict[str, MatrixFacts]],
        Meta(
            description="the matrices that each graph multiplies with, by how they are stored; none: all are `weights`"
        ),
    ] = dataclasses.field(default_factory=dict)
    least_onnxruntime: Annotated[
        str | None, Meta(description="the oldest ONNX Runtime that runs the graphs; none for other engines")
    ] = None
    made_for: Annotated[
        str | None,
        Meta(description="the class of machines for which engine and operators were chosen; null: they were given"),
    ] = None
    files: Annotated[
        dict[str, FileFacts], Meta(description="every file of the bundle but the manifest, by its name")
    ] = dataclasses.field(default_factory=dict)
    format_version: Annotated[Positive, Meta(description="version of the bundle and of this manifest")] = FORMAT_VERSION
    contract_version: Annotated[Positive, Meta(description="version of the graphs' inputs and outputs")] = (
        CONTRACT_VERSION
    )
    edgekv_version: Annotated[str, Meta(description="the edgekv that made it")] = dataclasses.field(
        default_factory=lambda: edgekv.__version__
    )

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as plain data."""
        return dataclasses.asdict(self)

    @property
    def identity(self) -> str:
        """Stands for all files of the bundle: two of equal identity compute alike on one machine."""
        hashes = sorted((name, facts["sha256"]) for name, facts in self.files.items())
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    def weights_bytes(self) -> int:
        """Bytes of the bundle that a run holds in memory at the most.

        Of a tied embedding that is stored a second time, for its rows, none: they are read from the file one by one.
        """
        size = sum(facts["bytes"] for facts in self.files.values())
        table, model = self.embedding, self.model
        if table is None or not model.tied_embeddings:
            return size
        apart = table.layout.bits > _HEAD_BITS[self.weights] if table.apart is None else table.apart
        return size - table.table_bytes(model.vocab_size, model.hidden_size) if apart else size

    def matrices_by_kind(self) -> dict[str, MatrixFacts]:
        """Return what the products of all graphs read, by how it is stored, the larger part first."""
        total: dict[str, MatrixFacts] = {}
        for kinds in self.matrices.values():
            for kind, facts in kinds.items():
                so_far = total.setdefault(kind, {"weights": 0, "bytes": 0})
                so_far["weights"] += facts["weights"]
                so_far["bytes"] += facts["bytes"]
        return dict(sorted(total.items(), key=lambda entry: -entry[1]["weights"]))

    def kinds(self, graph: str) -> set[str]:
        """Return how the matrices are stored that a graph multiplies with."""
        return set(self.matrices.get(graph, {})) or {self.weights}

    def inline_spec(self) -> GraphSpec:
        """Return what the graph of an inline bundle takes and gives."""
        return inline_spec(self.model, self.page_size, self.contract_version, self.io)

    def check(self) -> None:
        """Hold the fields against each other, and against the sizes of the files.

        Raises:
            FormatError: nothing can run with this; the message names the field.
        """
        for name, choices in (("engine", ENGINES), ("form", FORMS), ("weights", WEIGHTS), ("io", IO)):
            one_of(getattr(self, name), name, choices)
        if self.operators is not None:
            one_of(self.operators, "operators", OPERATORS)
        if self.source_codes is not None:
            one_of(self.source_codes, "source_codes", SOURCE_CODES)
        self.model.check()
        self.model.pages(self.page_size)
        for name in self.files:
            plain_name(name, "files")
        named = [("tokenizer", self.tokenizer), *(("graphs", name) for name in self.graphs)]
        if self.chat_template is not None:
            named.append(("chat_template", self.chat_template))
        if self.embedding is not None:
            named.append(("embedding.file", self.embedding.file))
        for where, name in named:
            if plain_name(name, where) not in self.files:
                raise FormatError(f"{where} names {name!r}, which is not among the files")
        count = self.model.n_layers + 1 if (self.engine, self.form) == ("onnx", "split") else 1
        if len(self.graphs) != count:
            raise FormatError(f"graphs has {len(self.graphs)} names, the {self.form} form of this model has {count}")
        if self.form == "split":
            self._check_embedding()

    def _check_embedding(self) -> None:
        spec, hidden = self.embedding, self.model.hidden_size
        if spec is None:
            raise FormatError("embedding is missing, which the split form needs")
        one_of(spec.dtype, "embedding.dtype", EMBEDDING_LAYOUTS)
        block = spec.layout.block
        if block and hidden % block:
            raise FormatError(f"model.hidden_size is {hidden}, no multiple of {block}")
        needed, there = spec.end_bytes(self.model.vocab_size, hidden), self.files[spec.file]["bytes"]
        if needed > there:
            raise FormatError(f"the embedding needs {needed} bytes of {spec.file}, which has {there}")


def file_sha256(path: Path) -> str:
    """Hash a file without holding it in memory."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: Manifest, progress: Callable[[str], None] = lambda name: None) -> Manifest:
    """Hash every file of ``folder`` and write the manifest, atomically and last.

    Args:
        progress: called with the name of each file before it is hashed.
    """
    files: dict[str, FileFacts] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        name = path.relative_to(folder).as_posix()
        progress(name)
        files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = dataclasses.replace(manifest, files=files)
    manifest.check()
    temporary = folder / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps(manifest.to_json(), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a bundle. File contents are not checked here; see :func:`check_files`.

    Raises:
        BundleError: no bundle, a newer format, or a damaged manifest.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise BundleError(f"there is no {folder}; a bundle is made with: edgekv export SOURCE --out {folder}")
    if not path.is_file():
        checkpoint = (folder / "config.json").is_file()
        source, out = (folder, f"{folder}.edgekv") if checkpoint else ("SOURCE", folder)
        raise BundleError(
            f"{folder} is {'a checkpoint, not' if checkpoint else 'not'} a bundle: it has no {MANIFEST}; make one with: edgekv"
            f" export {source} --out {out}"
        )
    try:
        data = plain_json(read_whole(file_within(folder, MANIFEST)))
        for field, what, known in VERSIONS:
            version = data.get(field, 1) if isinstance(data, dict) else 1
            if isinstance(version, int) and version > known:
                raise BundleError(
                    f"{folder} has {what} {version}, this edgekv ({edgekv.__version__}) reads up to {known};"
                    " upgrade edgekv or export again"
                )
        manifest = checked(data, Manifest)
        manifest.check()
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    except BundleError:
        raise
    except UsageError as error:
        raise BundleError(f"{path} is damaged, or not of this edgekv: {error}; export the bundle again") from error
    return manifest


def check_files(folder: Path, manifest: Manifest, *, stamp: Path | None = None) -> None:
    """Check that every file of the bundle is the one that was exported.

    Args:
        stamp: remembers size and mtime of files that passed, so that gigabytes are hashed once and not at
            each start. None hashes all.

    Raises:
        BundleError: a file is missing, or differs from its hash.
    """
    seen = {}
    for name, expected in manifest.files.items():
        try:
            status = file_within(folder, name).stat()
        except FormatError as error:
            raise BundleError(f"{folder}: {error}") from error
        except OSError as error:
            raise _unreadable(folder, name, error) from error
        if status.st_size != expected["bytes"]:
            raise BundleError(
                f"{folder}: {name} has {status.st_size} bytes, the manifest says {expected['bytes']};"
                " copy the bundle again, or export it again"
            )
        seen[name] = [status.st_size, status.st_mtime_ns, expected["sha256"]]
    if stamp is not None and _read_stamp(stamp) == seen:
        return
    for name, expected in manifest.files.items():
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            raise _unreadable(folder, name, error) from error
        if found != expected["sha256"]:
            raise BundleError(f"{folder}: {name} differs from its sha256; copy the bundle again, or export it again")
    if stamp is not None:
        try:
            make_own_folder(stamp.parent)
            replace_own(stamp, json.dumps(seen).encode())
        except OSError:
            pass  # a read-only home only costs the hashing next time


def _unreadable(folder: Path, name: str, error: OSError) -> BundleError:
    problem = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return BundleError(f"{folder}: {name} {problem}; copy the whole bundle again, or export it again")


def _read_stamp(stamp: Path) -> Any:
    try:
        return plain_json(read_own(stamp))
    except (OSError, FormatError):
        return None
