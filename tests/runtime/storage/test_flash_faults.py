"""What can go wrong with flash under a running process: one clear error, and never a wrong token before it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekv.errors import StoreError
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.storage.flash import FlashStore
from edgekv.tiers import KVMode, Tier
from tests.cases import seldom

from .dying import dying_medium

Bundle = Callable[..., Path]
TOKENS: list[int] = np.random.default_rng(3).integers(2, 1000, 700).tolist()
COUNT = 60


def truncated(store: FlashStore, records: list[int]) -> None:
    os.ftruncate(store.file.handle, store.spec.record_bytes)


def unreadable(store: FlashStore, records: list[int]) -> None:
    """Let every read fail in the kernel: the descriptors now only write."""
    closed = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (store.file.handle, store.file._direct):
        if descriptor is not None:
            os.dup2(closed, descriptor)
    os.close(closed)


def flipped(store: FlashStore, records: list[int]) -> None:
    for record in records:
        at = record * store.spec.record_bytes + 64 + record % store.spec.warm_bytes
        [byte] = os.pread(store.file.handle, 1, at)
        os.pwrite(store.file.handle, bytes([byte ^ 1 << record % 8]), at)


def swapped(store: FlashStore, records: list[int]) -> None:
    size = store.spec.record_bytes
    kept = [os.pread(store.file.handle, size, record * size) for record in records]
    for record, other in zip(records, kept[1:] + kept[:1], strict=True):
        os.pwrite(store.file.handle, other, record * size)


@pytest.mark.parametrize("attend", seldom(["exact", "selective:30%"], but=["exact"]))
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "is shorter than what was written"),
        (unreadable, "cannot read from the offload folder"),
        (flipped, "differs from its checksum"),
        (swapped, "differs from its checksum"),
    ],
)
def test_a_failing_medium_ends_the_run_and_every_token_before_is_right(
    damage: Callable[[FlashStore, list[int]], None], message: str, attend: str, bundle: Bundle, tmp_path: Path
) -> None:
    folder = bundle("demo")
    with Generator.open(folder, RunOptions(kv=KVMode.INT8, threads=2, attend=attend)) as roomy:
        expected = list(roomy.tokens(TOKENS, max_tokens=COUNT))
    options = RunOptions(kv_budget="22%", kv=KVMode.INT8, threads=2, attend=attend, offload=tmp_path, context=800)
    said: list[int] = []
    with Generator.open(folder, options) as generator:
        stream = generator.tokens(TOKENS, max_tokens=COUNT)
        said.append(next(stream))
        store, cache = generator.cache.manager.store, generator.cache  # type: ignore[union-attr]
        assert isinstance(store, FlashStore)
        assert cache is not None
        damage(store, sorted(cache.table.record[cache.table.tier == Tier.COLD].tolist()))
        with pytest.raises(StoreError, match=message):
            said.extend(stream)
        cache.check()
    assert said == expected[: len(said)]


def test_the_command_names_a_full_disk_in_one_line(bundle: Bundle, tmp_path: Path) -> None:
    """The limit on file sizes makes the write fail in the kernel, as a full disk does."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("It was a dark night. " * 120, encoding="utf-8")
    arguments = ["run", str(bundle("demo")), "--prompt-file", str(prompt), "--kv-budget", "22%", "--max-tokens", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "edgekv", *arguments, "--offload", str(tmp_path / "flash"), "--kv", "int8"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, 256 * 1024)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.strip().count("\n") == 0
    assert "is full; free some space, choose another with --offload DIR" in done.stderr
    assert sorted(path.name for path in (tmp_path / "flash").iterdir()) == ["lock", "wear.jsonl"]


DYING = """
import json, sys
from pathlib import Path
from edgekv.errors import EdgeKVError
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.tiers import KVMode
folder, offload, sign, attend, tokens = sys.argv[1:5] + [json.loads(sys.argv[5])]
options = RunOptions(kv_budget="22%", kv=KVMode.INT8, threads=2, attend=attend, offload=Path(offload), context=800)
said, error = [], None
with Generator.open(folder, options) as generator:
    try:
        for token in generator.tokens(tokens, max_tokens=60):
            said.append(token)
            if len(said) == 3:
                Path(sign).touch()
    except EdgeKVError as failure:
        error = f"{type(failure).__name__}: {failure}"
    generator.cache.check()
print(json.dumps({"said": said, "error": error}))
"""


def expected_tokens(folder: Path, attend: str) -> list[int]:
    with Generator.open(folder, RunOptions(kv=KVMode.INT8, threads=2, attend=attend)) as roomy:
        return list(roomy.tokens(TOKENS, max_tokens=COUNT))


@pytest.mark.parametrize("attend", seldom(["exact", "selective:30%"], but=["selective:30%"]))
def test_a_medium_that_answers_eio_ends_the_run_with_one_error(attend: str, bundle: Bundle, tmp_path: Path) -> None:
    sign = tmp_path / "dying"
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(bundle("demo")), str(tmp_path / "flash"), str(sign), attend, json.dumps(TOKENS)],
        env=dying_medium(tmp_path, sign),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["error"].startswith("StoreError: cannot read from the offload folder")
    assert "Input/output error" in facts["error"]
    assert 3 <= len(facts["said"]) < COUNT
    assert facts["said"] == expected_tokens(bundle("demo"), attend)[: len(facts["said"])]


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_deleted_under_a_running_process_changes_nothing(
    named: bool, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    offload = tmp_path / "flash" if named else None
    options = RunOptions(kv_budget="22%", kv=KVMode.INT8, threads=2, offload=offload, context=800)
    with Generator.open(bundle("demo"), options) as generator:
        stream = generator.tokens(TOKENS, max_tokens=COUNT)
        said = [next(stream)]
        shutil.rmtree(offload or tmp_path / "cache" / "edgekv" / "offload")
        written = generator.report().bytes_written
        said += list(stream)
        assert generator.report().bytes_read > 0
        assert generator.report().bytes_written >= written > 0
    assert said == expected_tokens(bundle("demo"), "exact")
