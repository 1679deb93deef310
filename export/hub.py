"""A checkpoint of the Hugging Face hub, by its name: the hub's own library fetches it into its own cache, once.

Only what an export reads is fetched: the configuration, the tokenizer, and the weights that transformers would read. Many
repositories hold the same weights in further formats.
"""

from __future__ import annotations

import re
from pathlib import Path

from edgekv.errors import CheckpointError, EngineMissing

#: ``owner/name``, perhaps the path of a GGUF file in it, and perhaps ``@revision``: a branch, a tag or a commit.
_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<file>[\w./-]+\.gguf))?(@(?P<revision>[\w./-]+))?"
)
_DESCRIPTIONS = ["*.json", "*.jinja"]


def fetch_source(source: str | Path) -> Path:
    """Return the folder or file of a source; one that the hub has is downloaded where the library's cache does not have it.

    What is here, or would lie in a folder that is here, is a path and never asked for. The library's environment variables hold:
    ``HF_HOME``, ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``.

    Raises:
        CheckpointError: there is no such model, it may not be read, the hub cannot be reached, or the disk is full.
        EngineMissing: the library is not installed.
    """
    found = _NAME.fullmatch(source) if isinstance(source, str) else None
    if found is None or Path(Path(source).parts[0]).exists():
        return Path(source)
    try:
        return _download(found)
    except ImportError as error:
        raise EngineMissing(
            f'fetching {source} needs {error.name}; install it: pip install "edgekv[export]"'
        ) from error


def _download(found: re.Match[str]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    from .weight_files import WHOLE, read_index

    repo, file, revision = found["repo"], found["file"], found["revision"]
    try:
        if file:
            return Path(hf_hub_download(repo, file, revision=revision))
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_DESCRIPTIONS, ignore_patterns=["*/*"]))
        weights = [WHOLE, *sorted(set(read_index(folder).values()))]
        # Of the same commit, whatever the branch has become since.
        return Path(snapshot_download(repo, revision=folder.name, allow_patterns=weights))
    except CheckpointError:
        raise
    except Exception as error:  # of the library, of HTTP, or of the disk
        raise CheckpointError(_said(found[0], error)) from error


def _said(name: str, error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{name} asks for a licence to be accepted: do so on its page at the hub, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name} is no folder or file here, and the Hugging Face hub has no such model that you may read"
    if isinstance(error, errors.RevisionNotFoundError | errors.RemoteEntryNotFoundError):
        return f"{name}: the Hugging Face hub has the model, but not this revision or file"
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return (
            f"{name} is no folder or file here, was not downloaded before, and the Hugging Face hub cannot be reached"
            " (or HF_HUB_OFFLINE is set)"
        )
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{name} cannot be downloaded from the Hugging Face hub: {reason[:200]}"
