"""Options that say where bytes go hold in every combination: seen by strace, over all that a process writes.

One process runs the command in every combination; each has folders of its own. What it looks for are keys and values of known
tokens, as they lie in a page, and the tokens themselves, as they lie in an index.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekv.bundle import read_manifest
from edgekv.errors import StoreError, UsageError
from edgekv.runtime.add_prefix import add_prefix
from edgekv.runtime.generate import Generator
from edgekv.runtime.options import RunOptions, SessionOptions
from edgekv.runtime.sessions import tools
from edgekv.runtime.sessions.folder import read_state
from edgekv.runtime.storage.segments import segment_paths
from edgekv.runtime.storage.wear import read_ledger
from edgekv.runtime.text import Text
from edgekv.spec import RECORD_HEADER_BYTES
from edgekv.tiers import KVMode
from tests.cases import taken
from tests.strangers import NOBODY

BUNDLE = Path(__file__).parent / "data" / "bundle-1"
SECRET = "a secret of more than sixteen bytes"
LIMIT_BYTES = 48 * 1024
NEEDLE_BYTES = 16
#: Tokens of the prefix (a step of prefill), and of what a session holds before the run.
SHARED = 256
OFFLOAD = ("nowhere", "folder", "objects", "objects and flash")
SESSIONS = ("none", "new", "continued", "forked", "read only")

DRIVER = """
import json, os, sys, tempfile
from pathlib import Path
from edgekv.cli.main import app
from edgekv.errors import EdgeKVError
from edgekv.runtime.storage import remote
remote.PART_BYTES = 16 * 1024  # less waits in RAM, and the bundle is a small one
for case in json.loads(Path(sys.argv[1]).read_text()):
    os.environ.update(XDG_CACHE_HOME=case["cache"], TMPDIR=case["tmp"])
    tempfile.tempdir = None
    if case["user"] is not None:
        os.seteuid(case["user"])
    said = ""
    try:
        app(case["arguments"], standalone_mode=False)
    except EdgeKVError as error:
        said = str(error)
    finally:
        if case["user"] is not None:
            os.seteuid(0)
    Path(case["said"]).write_text(said)
"""


@dataclass(frozen=True)
class Case:
    """One combination of options."""

    session: str
    prefix: bool
    offload: str
    encrypted: bool
    limited: bool

    @property
    def name(self) -> str:
        flags = {"prefix": self.prefix, "encrypted": self.encrypted, "limited": self.limited}
        session = f"{self.session} session" if self.session != "none" else "no session"
        return ", ".join((session, f"offload {self.offload}", *(name for name, on in flags.items() if on)))


def cases() -> Iterator[Case]:
    for row in itertools.product(SESSIONS, (False, True), OFFLOAD, (False, True), (False, True)):
        case = Case(*row)
        if case.session == "none" or case.offload == "nowhere":  # a session refuses --offload
            yield case


@dataclass
class Written:
    """What a run wrote, by file; ``said``: its error, if it ended with one."""

    home: Path
    said: str
    by_path: dict[Path, bytearray] = field(default_factory=lambda: defaultdict(bytearray))

    def holding(self, needles: list[bytes]) -> list[str]:
        """Return the folders of the run, files in them cut off, in which any of these bytes were written."""
        found = {path for path, data in self.by_path.items() if any(needle in data for needle in needles)}
        return sorted({path.relative_to(self.home).parts[0] for path in found})

    @property
    def page_bytes(self) -> int:
        """Bytes that went to flash as pages."""
        return sum(len(data) for path, data in self.by_path.items() if path.name.startswith("pages-"))


class World:
    """A folder for every case, with what it needs; what is to be found; and the log of one process that ran them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bundle = folder / "model.edgekv"
        shutil.copytree(BUNDLE, self.bundle)
        random = np.random.default_rng(5)
        words = [
            "sea",
            "light",
            "keeper",
            "storm",
            "gull",
            "rope",
            "tide",
            "salt",
            "oil",
            "wick",
            "fog",
            "horn",
            "rock",
        ]
        self.text = " ".join(random.choice(words, 118))
        self.tokens = Text.open(self.bundle, read_manifest(self.bundle)).encode(self.text)
        assert 460 < len(self.tokens) < 505, len(self.tokens)
        (folder / "prompt.txt").write_text(self.text)
        (folder / "key").write_text(SECRET)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        self.prefix = add_prefix(self.bundle, self.tokens[:SHARED], RunOptions(threads=1))[0]
        for name, secret in (("plain.kv", None), ("secret.kv", SECRET.encode())):
            self.save(folder / name, self.tokens[:SHARED], secret)
        self.save(folder / "all.kv", self.tokens, None)
        self.pages, self.rows = self.needles(folder / "all.kv")

    def save(self, path: Path, tokens: list[int], secret: bytes | None) -> None:
        options = RunOptions(threads=1, kv=KVMode.INT8, session=SessionOptions(path, secret=secret), prefixes=False)
        with Generator.open(self.bundle, options) as generator:
            generator.prefill(tokens, max_tokens=0)

    def needles(self, path: Path) -> tuple[list[bytes], list[bytes]]:
        """Return parts of the pages behind what is shared, and of its tokens as an index has them."""
        manifest = read_manifest(self.bundle)
        spec = manifest.model.pages(manifest.page_size)
        [file] = segment_paths(path).values()
        data = np.fromfile(file, np.uint8).reshape(-1, spec.record_bytes)
        rows = read_state(path, None).rows[SHARED // manifest.page_size :]
        parts = [
            data[record & 0xFFFFFFFF, RECORD_HEADER_BYTES:][start : start + NEEDLE_BYTES].tobytes()
            for row in rows
            for record in row.records
            for start in range(0, spec.warm_bytes - NEEDLE_BYTES, 97)
        ]
        pages = [part for part in parts if len(set(part)) > NEEDLE_BYTES // 2]
        assert len(pages) > 300
        return pages, [np.asarray(row.tokens, "<i4").tobytes() for row in rows]

    def prepare(self, number: int, case: Case) -> dict[str, object]:
        """Make the folders of a case and return what the driver needs to know."""
        home = self.folder / str(number)
        for name in ("cache", "tmp", "flash", "objects"):
            (home / name).mkdir(parents=True)
        prefixes = home / "cache" / "edgekv" / "prefixes"
        if case.prefix:
            shutil.copytree(self.prefix.parent.parent, prefixes)
        base = self.folder / ("secret.kv" if case.encrypted else "plain.kv")
        session = home / "session" / "chat.kv"
        if case.session in ("continued", "read only"):
            shutil.copytree(base, session)
        elif case.session == "forked":
            shutil.copytree(base, home / "session" / "first.kv")
            tools.fork(home / "session" / "first.kv", session, SECRET.encode() if case.encrypted else None)
        arguments = ["run", self.bundle, "--prompt-file", self.folder / "prompt.txt", "--raw", "-n", "5", "-q"]
        arguments += ["--kv", "int8", "--kv-budget", "72KiB", "--threads", "1"]
        if case.session != "none":
            arguments += ["--session", session]
        if case.offload == "folder":
            arguments += ["--offload", home / "flash"]
        elif case.offload != "nowhere":
            arguments += ["--offload", f"file://{home}/objects"]
            arguments += ["--flash-limit", "64KiB"] if case.offload == "objects and flash" else []
        if case.encrypted:
            arguments += ["--encrypt"]
        if case.limited:
            arguments += ["--max-write-per-day", str(LIMIT_BYTES)]
        root = case.session == "read only" and os.geteuid() == 0
        if case.session == "read only":
            for path in (*session.iterdir(), session):
                path.chmod(0o555 if path.is_dir() else 0o444)
        if root:  # whom permissions do not bind: another user runs the case
            for path in (home, *(path for path in home.rglob("*") if session not in (path, path.parent))):
                os.chown(path, NOBODY, NOBODY)
        return {
            "arguments": list(map(str, arguments)),
            "cache": str(home / "cache"),
            "tmp": str(home / "tmp"),
            "said": str(home / "said.txt"),
            "user": NOBODY if root else None,
        }

    def run(self, chosen: list[Case]) -> dict[Case, Written]:
        """Run all cases in one process, under strace."""
        # Those of another user last: packages that load late are not for everybody to read.
        order = sorted(chosen, key=lambda case: case.session == "read only")
        todo = [self.prepare(number, case) for number, case in enumerate(order)]
        (self.folder / "cases.json").write_text(json.dumps(todo))
        log = self.folder / "strace.txt"
        strace = ["strace", "-f", "-y", "--seccomp-bpf", "-qq", "-xx", "-s", "4000000", "-o", str(log)]
        calls = "write,pwrite64,writev,pwritev,pwritev2,sendto,sendmsg"
        done = subprocess.run(
            [*strace, "-e", f"trace={calls}", sys.executable, "-c", DRIVER, str(self.folder / "cases.json")],
            env={**os.environ, "EDGEKV_SESSION_KEY": SECRET, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = {
            case: Written(self.folder / str(number), (self.folder / str(number) / "said.txt").read_text())
            for number, case in enumerate(order)
        }
        with log.open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                call = re.match(r"\d+ +\w+\(\d+<([^>]*)>(?:\(deleted\))?, (.*)", line)
                if call is None:
                    continue
                path = Path(bytes.fromhex(call[1].replace("\\x", "")).decode() if "\\x" in call[1] else call[1])
                name = str(path)
                number = re.match(rf"{re.escape(str(self.folder))}/(\d+)/", name)
                if number is not None:
                    data = bytes.fromhex("".join(re.findall(r'"([^"]*)"', call[2])).replace("\\x", ""))
                    found[order[int(number[1])]].by_path[Path(name)] += data
        return found


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (apt-get install strace)")
    if subprocess.run(["strace", "-qq", "-e", "trace=none", "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace may not trace here")
    pytest.importorskip("cryptography")
    pytest.importorskip("obstore")
    folder = Path(tempfile.mkdtemp(prefix="edgekv-test-"))
    folder.chmod(0o755)
    cache = os.environ["XDG_CACHE_HOME"]
    try:
        yield World(folder)
    finally:
        os.environ["XDG_CACHE_HOME"] = cache
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def runs(world: World, request: pytest.FixtureRequest) -> dict[Case, Written]:
    return world.run(taken(request, "test_bytes_go_where_the_options_say_and_nowhere_else", "case"))


@pytest.mark.parametrize(
    "case",
    # Every run takes at most one of the three at a time.
    [
        pytest.param(case, marks=[] if case.prefix + case.encrypted + case.limited < 2 else pytest.mark.slow)
        for case in cases()
    ],
    ids=lambda case: case.name,
)
def test_bytes_go_where_the_options_say_and_nowhere_else(case: Case, runs: dict[Case, Written], world: World) -> None:
    run = runs[case]
    refused = "would pass --max-write-per-day" in run.said
    assert run.said == "" or (case.limited and refused), run.said
    places = {
        "nowhere": ["cache"],
        "folder": ["flash"],
        "objects": ["objects"],
        "objects and flash": ["cache", "objects"],
    }[case.offload]
    if case.session in ("new", "continued", "forked"):
        places = ["session"]
    if case.encrypted:
        places = []
    pages, tokens = run.holding(world.pages), run.holding(world.rows)
    if case.limited:
        assert set(pages) <= set(places)
        assert run.page_bytes <= LIMIT_BYTES
    else:
        assert pages == places
        if case.offload != "objects":
            assert run.page_bytes > LIMIT_BYTES, "the limit would not have been met"
    assert set(tokens) <= {"session"} - ({"session"} if case.encrypted else set())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": Path("flash")}, "a session keeps its pages in its own files: run it without --offload"),
        ({"offload": "file:///objects"}, "a session keeps its pages in its own files: run it without --offload"),
        ({"encrypt_offload": True}, "encrypt it, with a secret of its own"),
        ({"flash_limit": "1MiB"}, "give --offload URL with it"),
    ],
)
def test_a_session_refuses_what_it_would_not_do(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        Generator.open(BUNDLE, RunOptions(threads=1, session=SessionOptions(tmp_path / "chat.kv"), **options))
    assert list(tmp_path.iterdir()) == [], "nothing was begun"


def test_a_limit_for_flash_without_an_object_store_is_refused_even_where_all_fits_in_ram() -> None:
    with pytest.raises(UsageError, match="give --offload URL with it"):
        Generator.open(BUNDLE, RunOptions(threads=1, flash_limit="1MiB"))


def test_pages_that_are_copied_for_want_of_hard_links_count_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefix on another file system than the session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def no_link(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    tokens = [int(token) for token in np.random.default_rng(0).integers(2, 300, 170)]
    add_prefix(BUNDLE, tokens[:160], RunOptions(threads=1, prefill_chunk=32))
    monkeypatch.setattr(os, "link", no_link)
    for limit, reused in ((10**6, 160), (60_000, 0)):
        path = tmp_path / f"{limit}.kv"
        options = RunOptions(threads=1, prefill_chunk=32, session=SessionOptions(path), max_write_per_day=limit)
        generator = Generator.open(BUNDLE, options)
        generator.prefill(tokens, max_tokens=0)
        assert generator.report().reused_tokens == reused
        with contextlib.suppress(StoreError):  # beyond its limit it is not saved
            generator.close()
        written = sum(entry.bytes_written for entry in read_ledger(path)[0])
        assert written <= limit
        assert sum(file.stat().st_size for file in segment_paths(path).values()) <= written
