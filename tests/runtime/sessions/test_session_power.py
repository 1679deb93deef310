"""Power loss: writes that were not synced are lost, torn or reordered; what was committed is there, to the bit.

A preloaded library records every write and sync of a process (SQLite's too). For a crash after operation k, what a file got
before its last sync is there; of what came later, any part may be. The disk of each such crash is built and opened.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgekv.runtime.sessions.tools import verify
from tests.runtime.sessions.toy import Chat, open_session

ROOT = Path(__file__).resolve().parents[3]
SECTOR = 512


@dataclass(frozen=True)
class Op:
    kind: str
    path: str
    second: str
    offset: int
    data: bytes


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Op]]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and LD_PRELOAD")
    folder = tmp_path_factory.mktemp("recorded")
    library, log, root = folder / "recorder.so", folder / "log", folder / "disk"
    root.mkdir()
    source = Path(__file__).with_name("recorder.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    environment = {
        **os.environ, "LD_PRELOAD": str(library), "EDGEKV_LOG": str(log), "EDGEKV_LOG_ROOT": str(root), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    subprocess.run([sys.executable, "-m", "tests.runtime.sessions.scribe", root], cwd=ROOT, env=environment, check=True)
    return root, read_log(log)


def read_log(path: Path) -> list[Op]:
    content, at, ops = path.read_bytes(), 0, []
    while at < len(content):
        kind, a, b, c, offset = struct.unpack_from("<cIIIq", content, at)
        at += 21
        parts = content[at : at + a], content[at + a : at + a + b], content[at + a + b : at + a + b + c]
        ops.append(Op(kind.decode(), os.fsdecode(parts[0]), os.fsdecode(parts[1]), offset, parts[2]))
        at += a + b + c
    return ops


def disk_after(ops: list[Op], crash: int, rng: random.Random) -> dict[str, bytearray]:
    """Return the files that a power loss after ``crash`` operations leaves: one of the many possible ways."""
    last_sync: dict[str, int] = {}
    for index, op in enumerate(ops[:crash]):
        if op.kind == "s":
            last_sync[op.path] = index
        elif op.kind == "r" and op.path in last_sync:
            last_sync[op.second] = last_sync[op.path]
    lose = rng.choice([0.0, 0.3, 0.7, 1.0])
    files: dict[str, bytearray] = {}
    for index, op in enumerate(ops[:crash]):
        # A file is durable once it was synced, its name (renamed, removed) once its folder was.
        synced = op.path if op.kind in "wts" else str(Path(op.path).parent)
        durable = index <= last_sync.get(synced, -1)
        if op.kind in "wt" and not durable and rng.random() < lose:
            continue
        file = files.setdefault(op.path, bytearray()) if op.kind in "wt" else bytearray()
        if op.kind == "w":
            data = op.data
            if not durable and rng.random() < 0.3:  # torn: some of its sectors only
                for start in range(0, len(data), SECTOR):
                    if rng.random() < 0.5:
                        write(file, op.offset + start, data[start : start + SECTOR])
            else:
                write(file, op.offset, data)
        elif op.kind == "t":
            del file[op.offset :]
            file.extend(bytes(op.offset - len(file)))
        elif op.kind == "r" and op.path in files and (durable or rng.random() < 0.7):
            files[op.second] = files.pop(op.path)
        elif op.kind == "u" and (durable or rng.random() < 0.7):
            files.pop(op.path, None)
    return files


def write(file: bytearray, offset: int, data: bytes) -> None:
    if len(file) < offset:
        file.extend(bytes(offset - len(file)))
    file[offset : offset + len(data)] = data


def crash_and_resume(root: Path, ops: list[Op], crash: int, seed: int, folder: Path) -> int:
    promises = [
        (index, json.loads(op.data))
        for index, op in enumerate(ops)
        if op.kind == "w" and op.path == str(root / "promised")
    ]
    kept = [tokens for index, tokens in promises if index < crash]
    pending = next((tokens for index, tokens in promises if index >= crash), None)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in disk_after(ops, crash, random.Random(seed)).items():
        path = folder / Path(name).relative_to(root)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    path = folder / "chat.kv"
    if not path.exists():
        assert not kept
        return 0
    session = open_session(path)
    try:
        tokens = session.tokens
        assert tokens in (kept[-1:] or [[]]) + ([pending] if pending else []), f"crash {crash}, seed {seed}"
        chat = Chat(session)
        restored = chat.start(tokens)
        assert restored >= len(tokens) // 8 * 8, "every sealed page is there"
        assert not session.problems
        chat.check()
        chat.extend([7, 8, 9])
        chat.save()
    finally:
        session.close()
    assert verify(path) == ([], len(tokens) + 3)
    return restored


def test_what_was_committed_survives_a_power_loss_after_any_operation(
    recorded: tuple[Path, list[Op]], tmp_path: Path
) -> None:
    root, ops = recorded
    assert sum(op.kind == "s" for op in ops) > 40
    crashes = range(0, len(ops) + 1, 3)
    restored = [crash_and_resume(root, ops, crash, crash, tmp_path / "disk") for crash in crashes]
    assert max(restored) > 40


@pytest.mark.slow
def test_a_thousand_power_losses_lose_nothing_that_was_committed(
    recorded: tuple[Path, list[Op]], tmp_path: Path
) -> None:
    root, ops = recorded
    for seed in range(max(1, 1000 // len(ops) + 1)):
        for crash in range(len(ops) + 1):
            crash_and_resume(root, ops, crash, 100_000 * seed + crash, tmp_path / "disk")


def test_the_recorder_sees_what_the_disk_holds_at_the_end(recorded: tuple[Path, list[Op]]) -> None:
    root, ops = recorded
    everything = [op if op.kind != "u" else Op("s", op.path, "", 0, b"") for op in ops]
    final = disk_after(everything, len(ops), random.Random(0))
    for path in (root / "chat.kv").glob("pages-*"):
        assert bytes(final[str(path)]) == path.read_bytes()
