"""What a killed process leaves is gone after the next start; what a living one uses stays, however old it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgekv.errors import CheckpointError
from edgekv.export import export_model
from edgekv.runtime.generate import Generator
from edgekv.runtime.options import RunOptions
from edgekv.runtime.system.process import cache_home
from edgekv.scratch import ScratchFolder, remove_abandoned
from tests.checkpoints import make_checkpoint

BUNDLE = Path(__file__).parent / "data" / "bundle-1"
HOLDING = """
scratch = ScratchFolder(parent, "work-")
(scratch.path / "half").write_bytes(bytes(1000))
print("ready", flush=True)
time.sleep(600)
"""
EXPORT = """
from edgekv.export import export_model
def progress(step, done, total):
    if step == "hashing the bundle":
        print("ready", flush=True)
        time.sleep(600)
export_model(parent / "checkpoint", parent / "model.edgekv", engine="onnx", progress=progress)
"""
RUN = """
from edgekv.runtime.generate import Generator
from edgekv.runtime.options import RunOptions
generator = Generator.open(sys.argv[2], RunOptions(threads=1, kv_budget=80000, context=500, prefixes=False))
for token in generator.tokens(list(range(200)), max_tokens=9):
    print("ready", flush=True)
    time.sleep(600)
"""
REPLACING = """
scratch = ScratchFolder(parent, "work-")
(scratch.path / "made").write_text("new")
renamed = []
class Killed(type(parent)):
    def rename(self, target):
        if renamed:
            os.kill(os.getpid(), signal.SIGKILL)
        renamed.append(os.rename(self, target))
scratch.put(Killed(scratch.path / "made"), Killed(parent / "target"))
"""


@contextmanager
def process(code: str, *arguments: Path) -> Iterator[subprocess.Popen[str]]:
    """Run code in a process of its own, until it says that it is ready."""
    head = "import os, signal, sys, time\nfrom pathlib import Path\nfrom edgekv.scratch import ScratchFolder\n"
    head += "parent = Path(sys.argv[1])\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            yield child
        finally:
            child.kill()


def scratch_folders(parent: Path) -> list[Path]:
    return sorted(parent.glob("*.scratch"))


def test_the_folder_of_a_living_process_stays_and_that_of_a_killed_one_goes(tmp_path: Path) -> None:
    with process(HOLDING, tmp_path) as child:
        [theirs] = scratch_folders(tmp_path)
        os.utime(theirs, (0, 0))  # its age says nothing
        with ScratchFolder(tmp_path, "work-") as mine:
            assert sorted([theirs, mine.path]) == scratch_folders(tmp_path)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert (theirs / "half").exists()
        with ScratchFolder(tmp_path, "other-"), ScratchFolder(tmp_path, "work-") as mine:
            assert not theirs.exists()
    assert scratch_folders(tmp_path) == []


def test_only_what_is_named_and_owned_like_a_scratch_folder_is_removed(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in ("work-abcdefgh", "work-abc.scratch", "my-work-abcdefgh.scratch", "work")]
    for path in kept:
        path.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "work-12345678.scratch").symlink_to("elsewhere")
    (tmp_path / "work-87654321.scratch").write_text("a file")
    before = sorted(tmp_path.iterdir())
    remove_abandoned(tmp_path, "work-")
    remove_abandoned(tmp_path / "missing", "work-")
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "work-abcdef12.scratch").mkdir()
    remove_abandoned(tmp_path, "work-")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_is_dropped_or_left_to_the_end_of_the_process_is_removed(tmp_path: Path) -> None:
    ScratchFolder(tmp_path, "work-")
    assert scratch_folders(tmp_path) == []
    code = HOLDING.replace("time.sleep(600)", "if not os.fork(): sys.exit()\nos.wait()\nassert scratch.path.is_dir()")
    with process(code, tmp_path) as child:
        assert child.wait() == 0
    assert scratch_folders(tmp_path) == []


def test_what_was_to_be_replaced_is_back_after_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    with process(REPLACING, tmp_path) as child:
        assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "target").exists()
    with ScratchFolder(tmp_path, "work-") as scratch:
        assert (tmp_path / "target").read_text() == "old"
        made = scratch.path / "made"
        made.write_text("new")
        scratch.put(made, tmp_path / "target")
        assert (tmp_path / "target").read_text() == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "target"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_export_that_was_ended_leaves_nothing_once_the_next_one_has_begun(
    number: signal.Signals, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    with process(EXPORT, tmp_path) as child:
        [left] = scratch_folders(tmp_path)
        child.send_signal(number)
        child.wait()
    assert list(left.glob("model.edgekv/*.onnx"))
    with pytest.raises(CheckpointError):
        export_model(tmp_path / "none", tmp_path / "model.edgekv")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_run_that_was_killed_leaves_no_folder_once_the_next_one_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    offload = cache_home() / "offload"
    with process(RUN, tmp_path, BUNDLE) as child:
        child.kill()
        child.wait()
    assert len(scratch_folders(offload)) == 1
    with Generator.open(BUNDLE, RunOptions(threads=1, kv_budget=80_000, context=500, prefixes=False)) as generator:
        assert len(list(generator.tokens(list(range(200)), max_tokens=9))) > 0
        assert len(scratch_folders(offload)) == 1
    assert [path.name for path in offload.iterdir()] == ["wear.jsonl"]
