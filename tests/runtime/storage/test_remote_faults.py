"""What can go wrong with an object store under a running process: the right text, or one clear error after right tokens."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest

from edgekv.errors import StoreError, UsageError
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.storage.objects import first_line, list_runs
from edgekv.runtime.storage.remote import ObjectStore
from edgekv.tiers import KVMode
from tests.cases import seldom
from tests.runtime.storage.conftest import S3Server, Wire

Bundle = Callable[..., Path]
TOKENS: list[int] = np.random.default_rng(3).integers(2, 1000, 700).tolist()
COUNT = 40
URL = "s3://kv-cache/runs"


def options(**changed: Any) -> RunOptions:
    return RunOptions(kv=KVMode.INT8, threads=2, context=800, **changed)


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> dict[str, list[int]]:
    """The text of each way to attend with all pages in RAM."""
    said = {}
    for attend in ("exact", "selective:30%"):
        with Generator.open(bundle("demo"), options(attend=attend)) as generator:
            said[attend] = list(generator.tokens(TOKENS, max_tokens=COUNT))
    return said


def tight(attend: str = "exact", **changed: Any) -> RunOptions:
    return options(**{"kv_budget": "22%", "offload": URL, "attend": attend, **changed})


@pytest.mark.parametrize(
    ("flash_limit", "attend"),
    seldom(itertools.product([None, "200KiB"], ["exact", "selective:30%"]), but=[("200KiB", "exact")]),
)
def test_the_text_is_that_of_a_run_with_all_pages_in_ram(
    attend: str, flash_limit: str | None, bundle: Bundle, expected: dict[str, list[int]], s3: S3Server
) -> None:
    with Generator.open(bundle("demo"), tight(attend, flash_limit=flash_limit)) as generator:
        assert list(generator.tokens(TOKENS, max_tokens=COUNT)) == expected[attend]
        stats = generator.report()
        assert stats.cache is not None
        assert stats.cache.pages_by_tier["REMOTE"] > 20
        assert (stats.cache.pages_by_tier["COLD"] > 0) == (flash_limit is not None)
        assert stats.bytes_written <= 200 * 1024
        assert stats.remote_bytes_read > stats.remote_bytes_written >= 256 * 1024
        generator.cache.check()  # type: ignore[union-attr]
        assert len(list_runs(URL)) == 1
    assert list_runs(URL) == [], "the run removed its objects"


def broken_off(bundle: Bundle, run: RunOptions, harm: Callable[[ObjectStore], object]) -> tuple[list[int], str]:
    """Harm the store after the first token; returns what was said before the error, and the error."""
    said: list[int] = []
    with Generator.open(bundle("demo"), run) as generator:
        stream = generator.tokens(TOKENS, max_tokens=COUNT)
        said.append(next(stream))
        assert isinstance(generator.cache.manager.store, ObjectStore)  # type: ignore[union-attr]
        harm(generator.cache.manager.store)  # type: ignore[union-attr]
        with pytest.raises(StoreError) as caught:
            said.extend(stream)
        generator.cache.check()  # type: ignore[union-attr]
    return said, str(caught.value)


@pytest.mark.parametrize("attend", seldom(["exact", "selective:30%"], but=["exact"]))
def test_a_server_that_is_killed_ends_the_run_and_every_token_before_is_right(
    attend: str, bundle: Bundle, expected: dict[str, list[int]], s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="edgekv"):
        run = tight(attend, offload_patience_s=2.0)
        said, error = broken_off(bundle, run, lambda store: s3.signal(signal.SIGKILL))
    assert said == expected[attend][: len(said)]
    assert "cannot read from s3://kv-cache/runs" in error
    assert "Every token so far is right" in error
    assert "\n" not in error
    assert "objects of this run may be left in s3://kv-cache/runs/edgekv-" in caplog.text


def test_a_server_that_comes_back_in_time_costs_nothing_but_time(
    bundle: Bundle, expected: dict[str, list[int]], s3: S3Server
) -> None:
    with Generator.open(bundle("demo"), tight()) as generator:
        stream = generator.tokens(TOKENS, max_tokens=COUNT)
        said = [next(stream)]
        s3.signal(signal.SIGKILL)
        timer = threading.Timer(1.0, s3.start)
        timer.start()
        said.extend(stream)
        timer.join()
    assert said == expected["exact"]


@pytest.mark.slow
def test_a_slow_server_changes_nothing(bundle: Bundle, expected: dict[str, list[int]], wire: Wire) -> None:
    wire.delay_s = 0.003
    with Generator.open(bundle("demo"), tight("selective:30%")) as generator:
        assert list(generator.tokens(TOKENS, max_tokens=COUNT)) == expected["selective:30%"]
        wire.delay_s = 0.0


def test_a_server_that_stops_answering_is_given_up(
    bundle: Bundle, expected: dict[str, list[int]], s3: S3Server
) -> None:
    try:
        run = tight(offload_patience_s=3.0)
        said, error = broken_off(bundle, run, lambda store: s3.signal(signal.SIGSTOP))
    finally:
        s3.signal(signal.SIGCONT)
    assert said == expected["exact"][: len(said)]
    assert "give it more than 3 s with --offload-patience" in error


def flip(store: ObjectStore) -> None:
    for batch in obstore.list(store._store, f"{store.run}/"):
        for entry in batch:
            data = bytearray(obstore.get(store._store, entry["path"]).bytes())
            data[100::4096] = bytes(byte ^ 1 for byte in data[100::4096])
            obstore.put(store._store, entry["path"], bytes(data))


def delete(store: ObjectStore) -> None:
    obstore.delete(store._store, [entry["path"] for batch in obstore.list(store._store) for entry in batch])


@pytest.mark.parametrize(
    ("harm", "message"), [(flip, "differs from its checksums"), (delete, "an object or the bucket is gone")]
)
def test_changed_objects_end_the_run_and_every_token_before_is_right(
    harm: Callable[[ObjectStore], None], message: str, bundle: Bundle, expected: dict[str, list[int]], s3: S3Server
) -> None:
    said, error = broken_off(bundle, tight(), harm)
    assert said == expected["exact"][: len(said)]
    assert message in error


def test_a_server_that_dies_before_the_pages_are_out_leaves_them_in_ram(bundle: Bundle, s3: S3Server) -> None:
    with Generator.open(bundle("demo"), tight(offload_patience_s=1.0)) as generator:
        assert generator.prefill(TOKENS[:100], max_tokens=300) is not None
        s3.signal(signal.SIGKILL)
        with pytest.raises(StoreError, match="cannot write to s3://kv-cache/runs"):
            generator.step(TOKENS[100:356])
        generator.cache.check()  # type: ignore[union-attr]


def test_a_killed_run_leaves_objects_that_the_command_lists_and_removes(
    bundle: Bundle, tmp_path: Path, s3: S3Server
) -> None:
    url = f"file://{tmp_path}/objects"
    text = tmp_path / "prompt.txt"
    text.write_text("It was a dark night. " * 120, encoding="utf-8")
    command = [sys.executable, "-m", "edgekv"]
    run = [
        "run",
        str(bundle("demo")),
        "--prompt-file",
        str(text),
        "--kv-budget",
        "400KiB",
        "--kv",
        "int8",
        "--offload",
        url,
    ]
    process = subprocess.Popen(
        [*command, *run, "--max-tokens", "3000"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 1), "it has said something, so pages are out"
    process.kill()
    process.wait()
    process.stdout.close()

    def ask(*arguments: str) -> Any:
        done = subprocess.run([*command, "offload", *arguments], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    [left] = ask("list", url, "--json")
    assert left["objects"] >= 2
    assert left["size_bytes"] > 256 * 1024
    assert str(process.pid) in left["name"]
    assert ask("rm", url, "--older-than", "1", "--json") == {"removed": []}
    assert ask("rm", url, left["name"][:25], "--json") == {"removed": [left["name"]]}
    assert ask("list", url, "--json") == []


def test_a_session_refuses_an_object_store(bundle: Bundle, tmp_path: Path) -> None:
    run = options(offload="memory://", session=SessionOptions(tmp_path / "a.kv"))
    with pytest.raises(UsageError, match="run it without --offload"):
        Generator.open(bundle("demo"), run)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (r"the file C:\users\1\g<0> is locked", r"the file C:\users\1\g<0> is locked"),
        ("\x1b[31mred\r\nand\x07 more", " [31mred  and  more"),
        ("long " * 500, "long " * 80),
    ],
)
def test_what_a_server_says_is_told_as_one_line_of_plain_characters(said: str, told: str) -> None:
    error = RuntimeError(f"403 Forbidden: <?xml version='1.0'?><Error><Message>{said}</Message></Error>")
    line = first_line(error)
    assert line.startswith(f"403 Forbidden: {told}"[:300])
    assert line.isprintable()
    assert len(line) <= 403
