"""Sessions through the real runtime: a resumed run is the run that never stopped, and says what it reused."""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekv.errors import SessionMismatch, StoreError, StoreFull, StoreLocked, UsageError
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.sessions.session import Session
from edgekv.runtime.sessions.tools import contents, verify
from edgekv.runtime.storage.segments import SegmentStore, segment_paths
from edgekv.tiers import KVMode

Bundle = Callable[..., Path]


def prompt(count: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(2, 1000, count).tolist()
    return tokens


def opened(folder: Path, path: Path | None, every: int = 16, **options: object) -> Generator:
    session = SessionOptions(path, checkpoint_tokens=every) if path else None
    return Generator.open(folder, RunOptions(threads=2, session=session, **options))  # type: ignore[arg-type]


def uninterrupted(folder: Path, tokens: list[int], count: int, **options: object) -> list[int]:
    with opened(folder, None, kv=KVMode.INT8, **options) as generator:  # type: ignore[arg-type]
        return list(generator.tokens(tokens, max_tokens=count))


@pytest.mark.parametrize("form", ["split", "inline"])
def test_a_resumed_run_equals_the_uninterrupted_one_and_computes_nothing_again(
    form: str, bundle: Bundle, tmp_path: Path
) -> None:
    folder, tokens, path = bundle("demo", form), prompt(150), tmp_path / "chat.kv"
    expected = uninterrupted(folder, tokens, 90)
    with opened(folder, path) as generator:
        assert list(generator.tokens(tokens, max_tokens=40)) == expected[:40]
    with opened(folder, path) as generator:
        assert generator.session is not None
        assert generator.session.tokens == tokens + expected[:40]
        assert list(generator.tokens(generator.session.tokens, max_tokens=50)) == expected[40:]
        assert generator.report().reused_tokens == generator.session.reused_tokens == 189
        assert generator.session.computed_tokens == 1
        assert generator.cache is not None
        generator.cache.check()
    assert verify(path) == ([], 240)


def test_a_session_resumes_in_the_other_form_and_under_any_budget(bundle: Bundle, tmp_path: Path) -> None:
    tokens, path = prompt(300), tmp_path / "chat.kv"
    expected = uninterrupted(bundle("demo"), tokens, 60)
    got: list[int] = []
    for form, budget in (("split", None), ("inline", None), ("split", "30%"), ("split", "24%")):
        with opened(bundle("demo", form), path, kv_budget=budget, context=1200) as generator:
            assert generator.session is not None
            start = generator.session.tokens or tokens
            got += generator.tokens(start, max_tokens=15)
            generator.cache.check()  # type: ignore[union-attr]
    assert got == expected


def test_logits_after_a_resume_have_the_bits_of_a_run_that_never_stopped(bundle: Bundle, tmp_path: Path) -> None:
    """Also after a kill, which leaves no open page behind: its tokens are computed again in the same steps."""
    folder, tokens = bundle("demo"), prompt(77)

    def logits(generator: Generator) -> list[np.ndarray]:
        return [generator.step([token]).copy() for token in prompt(40, seed=1)]

    with opened(folder, tmp_path / "whole.kv") as generator:
        list(generator.tokens(tokens, max_tokens=12))
        expected = logits(generator)
    for whole in (True, False):
        path = tmp_path / f"{whole}.kv"
        generator = opened(folder, path)
        list(generator.tokens(tokens, max_tokens=12))
        if whole:
            generator.close()
        else:  # what kill -9 leaves: only what was committed
            generator.save()
            os.rename(path, tmp_path / "killed.kv")
            path = tmp_path / "killed.kv"
            assert generator.session is not None
            generator.session.abandon()
        with opened(folder, path) as resumed:
            assert resumed.session is not None
            resumed.prefill(resumed.session.tokens, max_tokens=100)
            assert resumed.session.computed_tokens == 1 if whole else 1 < resumed.session.computed_tokens <= 32
            for mine, right in zip(logits(resumed), expected, strict=True):
                np.testing.assert_array_equal(mine, right)


def test_an_edited_history_is_reused_up_to_the_last_step_before_the_change(bundle: Bundle, tmp_path: Path) -> None:
    folder, tokens, path = bundle("demo"), prompt(200), tmp_path / "chat.kv"
    edited = [*tokens[:110], 5, *tokens[111:180]]
    expected = uninterrupted(folder, edited, 20, prefill_chunk=32)
    with opened(folder, path, prefill_chunk=32) as generator:
        list(generator.tokens(tokens, max_tokens=20))
    with opened(folder, path, prefill_chunk=32) as generator:
        assert generator.session is not None
        assert list(generator.tokens(edited, max_tokens=20)) == expected
        assert generator.session.reused_tokens == 96
        assert generator.session.discarded_tokens == 220 - 110
    assert contents(path)["tokens"][:180] == edited
    assert verify(path) == ([], 200)


def test_a_conversation_that_outgrows_its_context_goes_on_from_the_session(bundle: Bundle, tmp_path: Path) -> None:
    folder, tokens = bundle("demo"), prompt(100)
    expected = uninterrupted(folder, tokens, 60)
    with opened(folder, tmp_path / "chat.kv") as generator:
        first = list(generator.tokens(tokens, max_tokens=20))
        second = list(generator.tokens(tokens + first, max_tokens=40))
        assert generator.report().reused_tokens == 119
    assert first + second == expected


def test_a_checkpoint_of_100_tokens_writes_their_pages_and_little_more(bundle: Bundle, tmp_path: Path) -> None:
    folder, path = bundle("demo"), tmp_path / "chat.kv"
    with opened(folder, path, every=0) as generator:
        generator.manifest.model.__dict__["eos_token_ids"] = ()
        answer = generator.tokens(prompt(200), max_tokens=150)
        for _ in range(20):
            next(answer)
        generator.save()
        log = path / "index.sqlite-wal"
        before = generator.report().bytes_written, log.stat().st_size
        for _ in range(100):
            next(answer)
        generator.save()
        written = generator.report().bytes_written - before[0] + log.stat().st_size - before[1]
        spec = generator.manifest.model.pages(generator.manifest.page_size)
        pages = -(-100 // spec.page_size)
        assert written <= pages * spec.n_layers * spec.record_bytes + 64 * 1024
        generator.save()
        assert generator.report().bytes_written - before[0] <= pages * spec.n_layers * spec.record_bytes, "written once"


def test_pages_that_left_memory_are_not_written_again_by_a_checkpoint(bundle: Bundle, tmp_path: Path) -> None:
    with opened(bundle("demo"), tmp_path / "chat.kv", kv_budget="25%", context=1000) as generator:
        list(generator.tokens(prompt(800), max_tokens=30))
        stats = generator.report()
        spec = generator.manifest.model.pages(generator.manifest.page_size)
        assert stats.pages is not None
        assert stats.pages.pages_offloaded > 0
        assert stats.bytes_written == 829 // spec.page_size * spec.n_layers * spec.record_bytes


def test_a_session_of_something_else_is_refused_with_every_reason(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "chat.kv"
    with opened(bundle("demo"), path) as generator:
        list(generator.tokens(prompt(40), max_tokens=3))
        manifest = generator.manifest
    rope = dataclasses.replace(manifest.model.rope, attention_scaling=1.5)
    for change, reason in (
        ({"source_sha256": "0" * 64}, "checkpoint .*, this bundle 000000000000"),
        ({"tokenizer_sha256": "0" * 64}, "tokenizer"),
        ({"page_size": 64}, "page size 16, this bundle 64"),
        ({"weights": "int4"}, "weights fp32, this bundle int4"),
        ({"model": dataclasses.replace(manifest.model, rope=rope)}, "rope"),
        ({"model": dataclasses.replace(manifest.model, n_layers=9)}, "geometry 4 layers, .*, this bundle 9 layers"),
    ):
        with pytest.raises(SessionMismatch, match=reason):
            Session.open(SessionOptions(path), dataclasses.replace(manifest, **change))  # type: ignore[arg-type]
    same = dataclasses.replace(manifest, engine="executorch", form="inline")
    Session.open(SessionOptions(path), same).close()


def test_a_second_process_is_told_that_the_session_is_open(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "chat.kv"
    with opened(bundle("demo"), path) as generator:
        list(generator.tokens(prompt(40), max_tokens=3))
        command = [sys.executable, "-m", "edgekv", "run", str(bundle("demo")), "--session", str(path), "--prompt", "x"]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert f"the session {path} is open already, here or in another process; wait until it ends" in second.stderr
        assert second.stderr.count("\n") == 1
        with pytest.raises(StoreLocked):
            verify(path)


def test_read_only_media_run_do_not_save_and_say_so(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tokens, path = bundle("demo"), prompt(400), tmp_path / "chat.kv"
    with opened(folder, path) as generator:
        first = list(generator.tokens(tokens, max_tokens=10))
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    os_open = os.open

    def refuse(name: object, flags: int, *rest: object, **more: object) -> int:
        if str(path) in str(name) and flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))
        return os_open(name, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with opened(folder, path, kv_budget="40%", context=520) as generator:
        assert generator.session is not None
        answer = list(generator.tokens(tokens + first, max_tokens=100))
        assert generator.session.read_only == "its files cannot be written"
        assert generator.session.reused_tokens == 409
        assert generator.session.checkpoints == 0
        assert generator.report().pages.pages_offloaded > 0  # type: ignore[union-attr]
    monkeypatch.undo()
    assert answer == uninterrupted(folder, tokens, 110)[10:]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_all_files_are_readable_by_their_owner_only(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "chat.kv"
    with opened(bundle("demo"), path, every=8) as generator:
        for _ in generator.tokens(prompt(40), max_tokens=30):
            assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_full_disk_ends_saving_not_the_text(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, tokens, path = bundle("demo"), prompt(100), tmp_path / "chat.kv"
    expected = uninterrupted(folder, tokens, 80)
    generator = opened(folder, path)
    answer = generator.tokens(tokens, max_tokens=80)
    first = [next(answer) for _ in range(30)]
    held = len(generator.session.tokens)  # type: ignore[union-attr]

    def full(self: SegmentStore, tags: list[int], pages: list[np.ndarray]) -> list[int]:
        raise StoreFull("no room")

    monkeypatch.setattr(SegmentStore, "write", full)
    assert first + list(answer) == expected
    assert generator.session.failure == "no room"  # type: ignore[union-attr]
    with pytest.raises(StoreError, match="the session was not saved: no room"):
        generator.close()
    monkeypatch.undo()
    problems, usable = verify(path)
    assert not problems
    assert usable >= held
    with opened(folder, path) as generator:
        start = generator.session.tokens  # type: ignore[union-attr]
        assert start + list(generator.tokens(start, max_tokens=180 - len(start))) == tokens + expected


def test_space_of_a_forgotten_history_is_used_again(bundle: Bundle, tmp_path: Path) -> None:
    folder, path = bundle("demo"), tmp_path / "chat.kv"
    sizes = []
    for seed in range(4):
        with opened(folder, path) as generator:
            list(generator.tokens(prompt(400, seed), max_tokens=5))
        sizes.append(sum(file.stat().st_size for file in segment_paths(path).values()))
    assert max(sizes) <= 2.2 * sizes[0]


@pytest.mark.parametrize(("change", "message"), [({"kv": KVMode.FP16}, "INT8"), ({"allow_drop": True}, "every page")])
def test_what_a_session_cannot_keep_is_refused(
    change: dict[str, object], message: str, bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        opened(bundle("demo"), tmp_path / "chat.kv", **change)  # type: ignore[arg-type]


def test_a_folder_that_is_something_else_is_left_alone(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(UsageError, match="is not a session"):
        opened(bundle("demo"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["photo.jpg"]
