"""Two commands at once on the same folder: each does its work, or says in one line why not; what is left is whole.

Processes are forked from one that has everything loaded, so that they meet: an interpreter takes longer to start than to work.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edgekv.bundle import read_manifest
from edgekv.runtime.add_prefix import add_prefix
from edgekv.runtime.generate import Generator
from edgekv.runtime.options import RunOptions, SessionOptions
from edgekv.runtime.sessions.folder import is_session, read_state
from edgekv.runtime.sessions.tools import verify
from edgekv.runtime.storage.wear import WearLedger
from edgekv.runtime.text import Text
from tests.cases import taken

BUNDLE = Path(__file__).parent / "data" / "bundle-1"

DRIVER = """
import json, os, sys
from pathlib import Path
import onnxruntime, tokenizers
from edgekv.cli.main import main
from edgekv.cli import prefix, run, sessions, stats
from edgekv.runtime import add_prefix, generate, sampling
from edgekv.runtime.sessions import tools
from edgekv.runtime.kernels.choose import load_kernels
load_kernels()
sys.stdout.flush()

def started(folder, number, arguments, gate):
    child = os.fork()
    if child:
        return child
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ["TMPDIR"] = str(folder / "tmp")
    for name, handle in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{name}-{number}", os.O_WRONLY | os.O_CREAT), handle)
    os.close(gate[1])
    os.read(gate[0], 1)
    sys.argv = ["edgekv", *arguments]
    main()
    sys.exit(0)

for case in json.loads(Path(sys.argv[1]).read_text()):
    folder, gate = Path(case["folder"]), os.pipe()
    children = [started(folder, number, arguments, gate) for number, arguments in enumerate(case["commands"])]
    os.close(gate[0])
    os.close(gate[1])  # now
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / "codes.json").write_text(json.dumps(codes))
"""

#: By what the commands have in common: {0} is the folder of the pair, {1} which of the two it is.
TEXT = "--raw -f {0}/text.txt -n 4 --threads 1 -q"
COMMANDS = {
    "session": {
        "run": f"run {BUNDLE} --session {{0}}/chat.kv {TEXT}",
        "continue": f"run {BUNDLE} --session {{0}}/chat.kv --continue -n 4 --threads 1 -q",
        "list": "sessions list {0}",
        "show": "sessions show {0}/chat.kv",
        "verify": "sessions verify {0}/chat.kv",
        "compact": "sessions compact {0}/chat.kv",
        "export": "sessions export {0}/chat.kv {0}/copy.kv",
        "fork": "sessions fork {0}/chat.kv {0}/fork{1}.kv",
        "rm": "sessions rm {0}/chat.kv",
    },
    "prefix": {
        "add": f"prefix add {BUNDLE} --file {{0}}/text.txt",
        "add another": f"prefix add {BUNDLE} --file {{0}}/other.txt",
        "list": "prefix list --json",
        "rm": "prefix rm --all",
        "run": f"run {BUNDLE} {TEXT}",
        "run a session": f"run {BUNDLE} --session {{0}}/new{{1}}.kv {TEXT}",
    },
    "offload": {
        "run": f"run {BUNDLE} --offload {{0}}/flash --kv int8 --kv-budget 72KiB {TEXT}",
        "run encrypted": f"run {BUNDLE} --offload {{0}}/flash --encrypt --kv int8 --kv-budget 72KiB {TEXT}",
        "run elsewhere": f"run {BUNDLE} --kv int8 --kv-budget 72KiB --max-write-per-day 1GB {TEXT}",
        "stats": "stats {0}/flash",
    },
}
Pair = tuple[str, str, str]
PAIRS: list[Pair] = [
    (group, first, second)
    for group, commands in COMMANDS.items()
    for first, second in itertools.combinations_with_replacement(commands, 2)
]
#: Those that write the same thing; the rest are slow tests.
NARROW: list[Pair] = [
    *((group, name, name) for group, name in (
        ("session", "run"), ("session", "compact"), ("session", "export"), ("session", "rm"), ("prefix", "add"),
        ("prefix", "rm"), ("prefix", "run a session"), ("offload", "run"), ("offload", "run elsewhere"),
    )),
    ("session", "run", "rm"), ("session", "run", "compact"), ("session", "run", "fork"), ("prefix", "add", "rm"),
    ("prefix", "rm", "run a session"), ("offload", "run", "stats"),
]  # fmt: skip


#: Of these, one that writes and one that removes in each group: every run takes them.
OFTEN: list[Pair] = [
    ("session", "run", "run"), ("session", "run", "rm"), ("prefix", "add", "add"), ("prefix", "rm", "rm"),
    ("offload", "run", "run"),
]  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How one of the two ended."""

    code: int
    out: str
    err: str


class World:
    """A folder for each pair."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
        self.texts = {name: " ".join(random.choice(words, 100)) for name in ("text.txt", "other.txt")}
        self.tokens = Text.open(BUNDLE, read_manifest(BUNDLE)).encode(self.texts["text.txt"])
        cache = os.environ["XDG_CACHE_HOME"]
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        try:
            add_prefix(BUNDLE, self.tokens[:256], RunOptions(threads=1))
            options = RunOptions(threads=1, session=SessionOptions(folder / "chat.kv"), prefixes=False)
            with Generator.open(BUNDLE, options) as generator:
                list(generator.tokens(self.tokens[:200], max_tokens=5))
                self.held = generator.session.tokens  # type: ignore[union-attr]
        finally:
            os.environ["XDG_CACHE_HOME"] = cache

    def run(self, pairs: list[Pair]) -> dict[Pair, tuple[Path, list[Ended]]]:
        todo = []
        for number, (group, *names) in enumerate(pairs):
            folder = self.folder / f"{len(pairs)}-{number}"
            (folder / "tmp").mkdir(parents=True)
            shutil.copytree(self.folder / "chat.kv", folder / "chat.kv")
            shutil.copytree(self.folder / "cache", folder / "cache")
            (folder / "flash").mkdir()
            with WearLedger(folder / "flash") as ledger:
                ledger.reserve(1000)
            for name, text in self.texts.items():
                (folder / name).write_text(text)
            commands = [COMMANDS[group][name].format(folder, which).split() for which, name in enumerate(names)]
            todo.append({"folder": str(folder), "commands": commands})
        (self.folder / "cases.json").write_text(json.dumps(todo))
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(self.folder / "cases.json")], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found = {}
        for number, pair in enumerate(pairs):
            folder = self.folder / f"{len(pairs)}-{number}"
            codes = json.loads((folder / "codes.json").read_text())
            said = [[(folder / f"{name}-{which}").read_text() for name in ("out", "err")] for which in range(2)]
            found[pair] = folder, [Ended(code, *texts) for code, texts in zip(codes, said, strict=True)]
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    pytest.importorskip("cryptography")
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def narrow(world: World, request: pytest.FixtureRequest) -> dict[Pair, tuple[Path, list[Ended]]]:
    return world.run(taken(request, "test_two_commands_that_write_the_same_do_their_work_or_say_why_not", "pair"))


@pytest.fixture(scope="module")
def others(world: World) -> dict[Pair, tuple[Path, list[Ended]]]:
    return world.run([pair for pair in PAIRS if pair not in NARROW])


def named(pair: Pair) -> str:
    return f"{pair[0]}: {pair[1]} and {pair[2]}"


@pytest.mark.parametrize(
    "pair", [pytest.param(pair, marks=[] if pair in OFTEN else pytest.mark.slow) for pair in NARROW], ids=named
)
def test_two_commands_that_write_the_same_do_their_work_or_say_why_not(
    pair: Pair, narrow: dict[Pair, tuple[Path, list[Ended]]], world: World
) -> None:
    check(pair, *narrow[pair], world)


@pytest.mark.exhaustive
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair not in NARROW], ids=named)
def test_any_two_commands_on_the_same_folder_do_their_work_or_say_why_not(
    pair: Pair, others: dict[Pair, tuple[Path, list[Ended]]], world: World
) -> None:
    check(pair, *others[pair], world)


def check(pair: Pair, folder: Path, both: list[Ended], world: World) -> None:
    for one in both:
        assert one.code in (0, 1, 2), one
        assert "Traceback" not in one.err
        if one.code:
            assert one.err.startswith("edgekv: "), one
            assert one.err.count("\n") == 1, one
    assert 0 in [one.code for one in both], both
    if pair[0] == "prefix":
        assert [one.code for one in both] == [0, 0], both
    for session in (path for path in folder.glob("*.kv") if is_session(path)):
        assert verify(session)[0] == [], session
        tokens = [token for row in read_state(session, None).rows for token in row.tokens]
        expected = world.tokens + world.held if len(tokens) > 208 else world.held
        assert tokens[:192] == expected[:192]
    for prefix in folder.glob("cache/edgekv/prefixes/*/*"):
        assert verify(prefix)[0] == []
    left = [path for path in folder.rglob("*") if path.name.endswith(".scratch") or path.name.startswith(".")]
    assert left == []
    assert list((folder / "tmp").iterdir()) == []


@pytest.mark.slow
def test_a_prefix_that_is_killed_on_its_way_is_never_listed_and_goes_with_the_next(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(world.texts["text.txt"])
    code = (
        "import os, sys\n"
        "from edgekv.runtime.generate import Generator\n"
        "from edgekv.cli.main import main\n"
        "prefill = Generator.prefill\n"
        "number = int(sys.argv.pop())\n"
        "def killed(*arguments, **options):\n"
        "    prefill(*arguments, **options)\n"
        "    os.kill(os.getpid(), number)\n"
        "Generator.prefill = killed\n"
        "main()"
    )
    root = tmp_path / "cache" / "edgekv" / "prefixes"
    command = [sys.executable, "-c", code, "prefix", "add", str(BUNDLE), "--file", str(tmp_path / "text.txt")]
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        done = subprocess.run([*command, str(int(number))], capture_output=True, text=True, check=False)
        assert done.returncode in (-number, 128 + number), done
        assert "Traceback" not in done.stderr
        listed = subprocess.run(
            [sys.executable, "-m", "edgekv", "prefix", "list", "--json"], capture_output=True, check=True
        )
        assert json.loads(listed.stdout) == []
    made, _ = add_prefix(BUNDLE, world.tokens, RunOptions(threads=1))
    assert list(root.iterdir()) == [made.parent]
    assert list(made.parent.iterdir()) == [made]
