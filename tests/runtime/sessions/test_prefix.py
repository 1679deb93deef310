"""The prefix cache: computed once, used by every later run and session that begins with it."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from edgekv.bundle import read_manifest
from edgekv.cli.main import app
from edgekv.errors import StoreError, UsageError
from edgekv.runtime.add_prefix import add_prefix
from edgekv.runtime.generate import Generator
from edgekv.runtime.options import RunOptions, SessionOptions
from edgekv.runtime.sessions import prefixes
from edgekv.runtime.sessions.tools import verify
from edgekv.tiers import KVMode

Bundle = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tokens(count: int, seed: int = 0) -> list[int]:
    numbers: list[int] = np.random.default_rng(seed).integers(2, 1000, count).tolist()
    return numbers


#: Prefill in steps of a page, so that short prefixes have several.
SHORT = RunOptions(threads=2, prefill_chunk=16, kv=KVMode.INT8)


def run(folder: Path, prompt: list[int], count: int = 20, **options: object) -> tuple[list[int], int]:
    with Generator.open(folder, dataclasses.replace(SHORT, **options)) as generator:  # type: ignore[arg-type]
        answer = list(generator.tokens(prompt, max_tokens=count))
        generator.cache.check()  # type: ignore[union-attr]
        return answer, generator.report().reused_tokens


def test_a_run_that_begins_with_a_prefix_skips_its_prefill(bundle: Bundle) -> None:
    folder, long = bundle("demo"), tokens(300)
    path, kept = add_prefix(folder, long, SHORT)
    assert kept == 300 // 16 * 16
    prompt = long + tokens(20, 1)
    expected, reused = run(folder, prompt, prefixes=False)
    assert reused == 0
    assert run(folder, prompt) == (expected, kept)
    assert run(folder, prompt, kv_budget="40%", context=700) == (expected, kept)
    assert run(folder, prompt, kv=KVMode.FP16)[1] == 0, "fp16 pages were asked for"
    assert run(folder, prompt, kv=KVMode.AUTO)[1] == 0, "fp16 pages fit, so a run without the prefix has them"
    assert run(folder, prompt, kv=KVMode.AUTO, kv_budget="40%", context=700) == (expected, kept)
    assert run(folder, prompt, prefill_chunk=32)[1] == 0, "it was cut at other places"
    assert run(folder, tokens(300, 2))[1] == 0
    other = long[:100] + tokens(50, 3)
    assert run(folder, other)[1] == 96, "as far as they agree"
    assert verify(path) == ([], kept)


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE as a full disk")
def test_a_full_disk_is_told_with_the_folder_that_one_can_look_at_and_leaves_nothing(bundle: Bundle) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
    try:
        with pytest.raises(StoreError, match=r"it is full, or refuses to be written; free some space") as caught:
            add_prefix(bundle("demo"), tokens(300), SHORT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f" in {prefixes.prefix_root()}: " in str(caught.value)
    assert list(prefixes.prefix_root().iterdir()) == []


def test_sessions_share_the_pages_of_a_prefix_and_keep_them_when_it_goes(bundle: Bundle, tmp_path: Path) -> None:
    folder, long = bundle("demo"), tokens(300)
    path, kept = add_prefix(folder, long, SHORT)
    sessions = [tmp_path / "a.kv", tmp_path / "b.kv"]
    for seed, session in enumerate(sessions):
        _, reused = run(folder, long + tokens(9, seed), session=SessionOptions(session))
        assert reused == kept
    [file] = path.glob("pages-*")
    assert file.stat().st_nlink == 3
    prefixes.remove_prefix(path)
    assert file.exists() is False
    for seed, session in enumerate(sessions):
        assert not verify(session)[0]
        _, reused = run(folder, long + tokens(9, seed), session=SessionOptions(session))
        assert reused > kept


def test_a_prefix_of_another_bundle_is_never_used(bundle: Bundle) -> None:
    long = tokens(100)
    add_prefix(bundle("demo"), long, SHORT)
    manifest = read_manifest(bundle("demo"))
    other = dataclasses.replace(manifest, tokenizer_sha256="0" * 64)
    with Generator.open(bundle("demo"), SHORT) as generator:
        by = generator.computed_by
    assert prefixes.find_prefix(manifest, [*long, 5], SHORT.prefill_chunk, by) is not None
    assert prefixes.find_prefix(other, [*long, 5], SHORT.prefill_chunk, by) is None
    assert prefixes.find_prefix(manifest, [*long, 5], SHORT.prefill_chunk, "another engine; avx2") is None


@pytest.mark.parametrize(("form", "weights"), [("inline", "fp32"), ("split", "int8")])
def test_another_form_or_weight_type_of_a_checkpoint_computes_other_bits_and_has_prefixes_of_its_own(
    bundle: Bundle, form: str, weights: str
) -> None:
    long, other = tokens(100), bundle("demo", form, weights)
    alone = run(other, [*long, 5])
    add_prefix(bundle("demo"), long, SHORT)
    assert run(other, [*long, 5]) == alone == (alone[0], 0)
    add_prefix(other, long, SHORT)
    assert run(other, [*long, 5]) == (alone[0], 96)
    assert run(bundle("demo"), [*long, 5])[1] == 96, "both are there"


def test_the_prefix_that_was_not_used_for_longest_goes_first(bundle: Bundle) -> None:
    folder = bundle("demo")
    paths = [add_prefix(folder, tokens(200, seed), SHORT)[0] for seed in range(3)]
    for age, path in enumerate(paths):
        os.utime(path, (1000 + age, 1000 + age))
    run(folder, [*tokens(200, 0), 5])
    size = prefixes.list_prefixes()[0].bytes_on_flash
    newest, _ = add_prefix(folder, tokens(200, 3), SHORT, limit=int(2.5 * size))
    assert [entry.path for entry in prefixes.list_prefixes()] == [newest, paths[0]]
    with pytest.raises(UsageError, match="above the limit"):
        add_prefix(folder, tokens(200, 4), SHORT, limit=1000)
    assert len(prefixes.list_prefixes()) == 2


def test_a_damaged_prefix_costs_time_not_correctness(bundle: Bundle) -> None:
    folder, long = bundle("demo"), tokens(200)
    path, _ = add_prefix(folder, long, SHORT)
    expected, _ = run(folder, [*long, 5], prefixes=False)
    [file] = path.glob("pages-*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    answer, reused = run(folder, [*long, 5])
    assert answer == expected
    assert 0 < reused < 192
    (path / "index.sqlite").write_bytes(b"nonsense")
    (path / "index.backup").unlink(missing_ok=True)
    assert run(folder, [*long, 5]) == (expected, 0)


def test_prefixes_from_the_command_line(bundle: Bundle, tmp_path: Path) -> None:
    text = tmp_path / "system.txt"
    text.write_text("You are the keeper of the lighthouse, and you speak of nothing but the sea. " * 12)
    runner = CliRunner()

    def call(*arguments: str) -> Any:
        result = runner.invoke(app, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    made = call("prefix", "add", str(bundle("demo")), "--file", str(text))
    [entry] = call("prefix", "list")
    assert entry["name"] == "system.txt"
    command = ("run", str(bundle("demo")), "--prompt", text.read_text() + "Once", "-n", "5")
    answer = call(*command, "--kv", "int8")
    assert answer["reused_tokens"] == made["tokens"] == 256
    answer = call(*command)
    assert (answer["reused_tokens"], answer["unused_prefix_tokens"]) == (0, 256)
    assert call("prefix", "rm", made["id"][:6]) == {"removed": [made["id"]]}
    assert call("prefix", "list") == []
    result = runner.invoke(app, ["prefix", "rm", "beef"])
    assert isinstance(result.exception, UsageError)


def test_score_and_step_do_with_a_cached_prefix_what_they_do_without(bundle: Bundle) -> None:
    folder, long = bundle("demo"), tokens(100)
    add_prefix(folder, long, SHORT)
    found: list[tuple[int, list[object]]] = []
    for prefixes_on in (False, True):
        with Generator.open(folder, dataclasses.replace(SHORT, prefixes=prefixes_on)) as generator:
            list(generator.tokens(long + tokens(9, 1), max_tokens=2))
            longer = generator.score(tokens(70, 2)).tolist()
            found.append((generator.stats.reused_tokens, [longer, generator.score([7, 8]).tolist()]))
    assert (found[0][0], found[1][0]) == (0, 96)
    assert found[0][1] == found[1][1]
