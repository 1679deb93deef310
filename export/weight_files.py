"""Which files of a checkpoint folder hold its weights: the choice of transformers, or a refusal where a folder holds two.

transformers takes ``model.safetensors``; without it, all files that ``model.safetensors.index.json`` names. Whatever lies beside
them is not part of the model. What could be part of it, or another model, is refused by name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from edgekv.errors import CheckpointError
from edgekv.model_config import read_json_object

from .codes import Codes, StoredCodes

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
#: Prefixes of the decoder's tensors in a model that reads images, too, with those of a decoder alone; and of that model's others.
_DECODER = (("language_model.", ""), ("model.language_model.", "model."))
_IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, under the name that it has there.

    ``dtype``: what the file calls the type of its numbers. ``read``: returns the tensor, as it is stored where that is a float.
    ``codes``: of a quantised matrix, what ``read`` computes its values from, where that can be said in blocks of 32.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], torch.Tensor]
    codes: StoredCodes | None = None

    def rearranged(self, rows: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...] | None = None) -> Stored:
        """Return the rows that ``rows`` makes of those of any tensor [rows, ...], of this shape if it is another."""
        read = functools.partial(_rearranged, self.read, rows)
        codes = self.codes and self.codes.changed(functools.partial(Codes.rearranged, rows=rows))
        return replace(self, shape=shape or self.shape, read=read, codes=codes)


def _rearranged(read: Callable[[], torch.Tensor], rows: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return rows(read())


def locate_tensors(folder: Path) -> dict[str, Stored]:
    """Return where every tensor of the checkpoint is stored, by the name that it has in the decoder with its head.

    Raises:
        CheckpointError: there are no weights, a file is missing or damaged, or it is not certain which files are meant.
    """
    stored: dict[str, Stored] = {}
    for file in _weight_files(folder):
        for tensor in _tensors(file):
            if tensor.name in stored:
                raise CheckpointError(
                    f"{folder}: {stored[tensor.name].file.name} and {file.name} both hold tensor {tensor.name}; keep the file"
                    " that is meant"
                )
            stored[tensor.name] = tensor
    if "embed_tokens.weight" in stored and not any(name.startswith("model.") for name in stored):
        # Saved from the decoder without its head, which transformers loads alike.
        return {name if name.startswith("lm_head.") else f"model.{name}": place for name, place in stored.items()}
    return stored


def decoder_alone(location: dict[str, Stored]) -> dict[str, Stored]:
    """Return the tensors of the decoder in a model that reads images, too, under the names that it has alone."""
    return {
        next((new + name.removeprefix(old) for old, new in _DECODER if name.startswith(old)), name): stored
        for name, stored in location.items()
        if not name.startswith(_IMAGES)
    }


def _weight_files(folder: Path) -> list[Path]:
    adapter = next((name for name in _ADAPTER if (folder / name).exists()), None)
    if adapter is not None:
        raise CheckpointError(
            f"{folder} holds an adapter ({adapter}), whose weights are not part of the model; merge it"
            " (merge_and_unload() in peft) and export what comes out, or remove it to export the model without it"
        )
    named = read_index(folder)
    whole, shards = folder / WHOLE, sorted({folder / file for file in named.values()})
    if whole.is_file():
        files = [whole]
    else:
        files = shards
        missing = next((file for file in shards if not file.is_file()), None)
        if missing is not None:
            raise CheckpointError(
                f"{folder}: {missing.name} is missing ({INDEX} names it); download the checkpoint again"
            )
    others = sorted(folder.glob("*.safetensors"))
    stray = next(
        (file for file in others if file not in files and (file in shards or _SHARD.fullmatch(file.name))), None
    )
    if files and stray is not None:
        raise CheckpointError(
            f"{folder} holds two checkpoints: {stray.name} does not belong to {INDEX if files == shards else WHOLE};"
            " keep the one that is meant"
        )
    if not files and others:
        raise CheckpointError(
            f"{folder} has neither {WHOLE} nor {INDEX}; is {others[0].name} to be renamed to {WHOLE}?"
        )
    if not files:
        raise CheckpointError(
            f"{folder} has no *.safetensors file; convert the checkpoint: save_pretrained() writes them"
        )
    if files == shards:
        held = {(tensor.name, file.name) for file in files for tensor in _tensors(file)}
        wrong = next((name for name, file in sorted(named.items()) if (name, file) not in held), None)
        if wrong is not None:
            raise CheckpointError(
                f"{folder}: {INDEX} says that {named[wrong]} holds tensor {wrong}, and it does not; the index belongs to another"
                " checkpoint, download both again"
            )
    return files


def read_index(folder: Path) -> dict[str, str]:
    """Return the file of each tensor as the index states it; nothing without an index."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    names = read_json_object(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{path} has no weight_map; download it again")
    for file in names.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {file!r} is no name of a safetensors file in this folder; download it again"
            )
    return names


def _tensors(file: Path) -> list[Stored]:
    try:
        with safe_open(file, framework="pt") as opened:
            views = [(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118 - not a mapping
            return [
                Stored(file, name, tuple(view.get_shape()), view.get_dtype(), functools.partial(_read, file, name))
                for name, view in views
            ]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file ({error}); download the checkpoint again"
        ) from error


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor
