"""Object stores by URL, through obstore: opening one, and what runs have left in it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from edgekv.errors import EngineMissing, StoreError, UsageError
from edgekv.settings import OBJECT_STORES

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Objects

#: Seconds that a store may stay silent, retries included, before the run ends with an error.
PATIENCE_S = 60.0
#: The same for requests on which no run depends yet.
FIRST_PATIENCE_S = 10.0
#: Characters of what a server says that are told.
_MOST_SAID = 400
#: The folder of a run begins with this.
RUN_PREFIX = "edgekv-"


def is_url(text: object) -> bool:
    """Return whether an offload target is a URL and not a folder."""
    return isinstance(text, str) and "://" in text


def open_objects(url: str, patience_s: float) -> Objects:
    """Return the object store behind a URL; credentials and endpoint come from the environment (``AWS_*``, ...).

    Raises:
        UsageError: not a URL of a known kind. EngineMissing: the obstore package is not installed.
    """
    scheme = url.partition("://")[0]
    if scheme not in OBJECT_STORES:
        known = ", ".join(f"{name}://" for name in OBJECT_STORES)
        raise UsageError(f"cannot offload to {url}: the kinds of object stores are {known}")
    try:
        from obstore.store import LocalStore, MemoryStore, from_url
    except ImportError as error:
        raise EngineMissing(f"--offload {url} needs the obstore package: pip install 'edgekv[cloud]'") from error
    if scheme == "memory":
        return MemoryStore()
    try:
        if scheme == "file":
            return LocalStore(url.removeprefix("file://"), mkdir=True, automatic_cleanup=True)
        endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
        store: Objects = from_url(
            url,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=min(5.0, patience_s)),
                "timeout": timedelta(seconds=max(1.0, patience_s / 3)),
            },
            retry_config={
                "max_retries": 1000,  # patience ends them
                "retry_timeout": timedelta(seconds=patience_s),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=2),
                    "base": 2,
                },
            },
        )
    except Exception as error:  # obstore raises errors of many kinds for a configuration that it refuses
        raise UsageError(f"cannot offload to {url}: {first_line(error)}") from error
    return store


@dataclass(frozen=True)
class LeftRun:
    """What one run has in an object store. ``newest``: when its last object was written."""

    name: str
    objects: int
    size_bytes: int
    newest: datetime


def list_runs(url: str, patience_s: float = FIRST_PATIENCE_S) -> list[LeftRun]:
    """Return the runs that have objects under a URL, oldest first: running ones, and what crashed ones left.

    Raises:
        StoreError: the store did not answer. UsageError, EngineMissing: see :func:`open_objects`.
    """
    import obstore

    store = open_objects(url, patience_s)
    runs: dict[str, list[Any]] = {}
    try:
        seen: set[str] = set()
        for batch in obstore.list(store):
            paths = {entry["path"] for entry in batch}
            if paths & seen:
                raise StoreError("it lists the same objects again and again")
            seen |= paths
            for entry in batch:
                name, _, rest = entry["path"].partition("/")
                if name.startswith(RUN_PREFIX) and rest:
                    runs.setdefault(name, []).append(entry)
    except Exception as error:
        raise StoreError(f"cannot list {url}: {first_line(error)}") from error
    found = [
        LeftRun(name, len(held), sum(entry["size"] for entry in held), max(entry["last_modified"] for entry in held))
        for name, held in runs.items()
    ]
    return sorted(found, key=lambda run: run.newest)


def delete_run(url: str, name: str, patience_s: float = FIRST_PATIENCE_S) -> None:
    """Delete the objects of one run.

    Raises:
        StoreError: the store did not answer.
    """
    import obstore

    store = open_objects(url, patience_s)
    try:
        obstore.delete(store, [entry["path"] for batch in obstore.list(store, f"{name}/") for entry in batch])
    except Exception as error:
        raise StoreError(f"cannot delete {url}/{name}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error of obstore, with what the server said, and without how retries were configured.

    What a server says goes to a terminal: no character of it but those that are printed, and no more than a line holds.
    """
    text = str(error).strip()
    line = (text.splitlines() or [type(error).__name__])[0]
    said = re.search("<Message>(.*?)</Message>", text, re.DOTALL)
    line = re.sub(r": <(\?xml|Error>).*", lambda _: f": {said[1]}" if said else "", line)
    line = re.sub(r",? max_retries: \d+, retry_timeout: \S+", "", line).strip().rstrip(".")
    line = "".join(character if character.isprintable() else " " for character in line)
    return line if len(line) <= _MOST_SAID else f"{line[:_MOST_SAID]}..."
