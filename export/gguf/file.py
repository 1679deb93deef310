"""A GGUF file: its metadata and tensors, checked before they are believed.

Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package ``gguf`` reads it and knows what
the codes of every type mean.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgekv.errors import CheckpointError
from edgekv.schema import shown

from ..codes import StoredCodes
from ..weight_files import Stored
from .codes import code_bits, read_codes

if TYPE_CHECKING:
    from gguf import ReaderTensor

MAGIC = b"GGUF"
#: What the package says of a type that it does not know.
_UNKNOWN_TYPE = re.compile(r"(\d+)\)? is not a valid GGMLQuantizationType")


@dataclass(frozen=True)
class GgufFile:
    """``metadata``: plain values by key. ``tensors``: by the names of GGUF, read when asked for."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a value of the metadata.

        Raises:
            CheckpointError: it is of another kind, or missing and there is no ``default``.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: the metadata has no {key}; convert the model to GGUF again")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.path}: {key} is {shown(value)}; convert the model to GGUF again")
        return value


def is_gguf(path: Path) -> bool:
    """Say whether a path is a file that begins as GGUF does, or is called so."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC or path.suffix == ".gguf"


def read_gguf(path: Path) -> GgufFile:
    """Open a GGUF file; its tensors stay on disk.

    Raises:
        CheckpointError: it is damaged, cut off, one part of several, or holds a type that cannot be read.
    """
    from gguf import GGUFReader  # brought by an extra

    try:
        reader = GGUFReader(path)
        metadata = {key: _plain(field.contents()) for key, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, TypeError, UnicodeDecodeError, OverflowError, OSError) as error:
        unknown = _UNKNOWN_TYPE.search(str(error))
        if unknown:
            raise CheckpointError(
                f"{path} holds a tensor of type {unknown[1]}, which the installed package gguf does not know; upgrade it"
                " (pip install -U gguf), or take a file of another quantisation"
            ) from error
        raise CheckpointError(
            f"{path} is cut off or not a GGUF file ({' '.join(str(error).split())}); download it again"
        ) from error
    parts = metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(f"{path} is one of {parts} parts; merge them with llama-gguf-split --merge first")
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        name = str(tensor.name)
        kind = tensor.tensor_type.name
        read = functools.partial(_read, path, tensor, shape)
        bits = code_bits(kind) if len(shape) == 2 else None
        codes = None if bits is None else StoredCodes(bits, functools.partial(read_codes, kind, tensor.data))
        tensors[name] = Stored(path, name, shape, kind, read, codes)
    return GgufFile(path, metadata, tensors)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return value


def _read(path: Path, tensor: ReaderTensor, shape: tuple[int, ...]) -> torch.Tensor:
    from gguf.quants import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: tensor {tensor.name} is {tensor.tensor_type.name}, which cannot be turned into floats; take a file of"
            " another quantisation"
        ) from error
    return torch.from_numpy(np.array(values, dtype=np.float32, order="C").reshape(shape))
