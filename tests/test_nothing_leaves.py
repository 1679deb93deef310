"""Nothing leaves the machine, and nothing is written but what docs/files.md lists: seen by strace, over real commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
Bundle = Callable[..., Path]

#: What a file is opened with when it is written, and calls that make, move or remove one.
WRITES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC")
CHANGES = re.compile(r"(creat|mkdir|rename|unlink|rmdir|symlink|link|truncate|mknod)(at2?)?$|renameat2$")
CALL = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\) += (-?\d+|\?)")
#: A path, and the folder that it is relative to, as `strace -y` shows it.
PATH = re.compile(r'(?:<([^<>"]*)>, )?"((?:[^"\\]|\\.)*)"')
SOCKETS = ("socket", "socketpair", "connect", "bind", "sendto", "sendmsg")
#: Read by the C library to turn a name into an address.
RESOLVER = (Path("/etc/resolv.conf"), Path("/etc/hosts"), Path("/etc/gai.conf"))


@pytest.fixture(scope="module", autouse=True)
def strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (apt-get install strace)")
    allowed = subprocess.run(["strace", "-qq", "-e", "trace=none", "true"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip(f"strace may not trace here: {allowed.stderr.decode().strip()}")


@dataclass
class Seen:
    """What a process and its children did."""

    sockets: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  #: looked up
    written: set[Path] = field(default_factory=set)

    def outside(self, *places: Path) -> list[Path]:
        """What was written elsewhere; making the folders above a place is part of writing there."""
        allowed = (Path("/dev"), Path("/proc"), *places)
        above = {folder for place in places for folder in place.parents}
        return sorted(path for path in self.written - above if not any(path.is_relative_to(place) for place in allowed))


@dataclass(frozen=True)
class Home:
    """The folder of a user whom nobody has seen before."""

    path: Path

    @property
    def cache(self) -> Path:
        return self.path / ".cache" / "edgekv"

    @property
    def tmp(self) -> Path:
        return self.path / "tmp"

    def run(self, *command: str | Path) -> Seen:
        """Run a command to its end, without any variable that could silence an engine."""
        log = self.path / "strace.txt"
        self.tmp.mkdir(exist_ok=True)
        own = {"HOME": str(self.path), "TMPDIR": str(self.tmp), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
        strace = ["strace", "-f", "-y", "--seccomp-bpf", "-qq", "-s", "4096", "-o", str(log)]
        result = subprocess.run(
            [*strace, "-e", "trace=%network,%file,creat", *map(str, command)],
            cwd=self.path,
            env={"PATH": os.environ["PATH"], **own},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return read_log(log)


def read_log(log: Path) -> Seen:
    seen = Seen()
    for line in log.read_text(errors="replace").splitlines():
        call = CALL.match(line.replace(" <unfinished ...>", ") = ?"))  # another thread's call came between: it counts
        if call is None:
            continue
        name, arguments, result = call.groups()
        paths = [Path(os.path.normpath(log.parent / folder / path)) for folder, path in PATH.findall(arguments)]
        if name in SOCKETS:
            seen.sockets.append(line)
        if any(path in RESOLVER for path in paths):
            seen.names.append(line)
        if not result.startswith("-") and (CHANGES.match(name) or WRITES.search(arguments)):
            seen.written.update(paths)
    return seen


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def edgekv(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "edgekv", *arguments]


#: The shape of a small model.
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 256, "vocab_size": 1000, "max_position_embeddings": 1024,
}  # fmt: skip
LONG = ["--prompt-file", str(ROOT / "examples" / "long_prompt.txt"), "--kv-budget", "25%", "-n", "5"]


def test_a_run_opens_no_socket_and_writes_only_into_the_cache_folder(bundle: Bundle, home: Home) -> None:
    seen = home.run(*edgekv("run", bundle("demo"), *LONG))
    assert seen.sockets == seen.names == []
    assert seen.outside(home.cache / "offload", home.cache / "verified") == []
    assert home.cache / "offload" / "wear.jsonl" in seen.written, "nothing would have been seen"


def test_a_session_or_an_offload_folder_is_written_beside_it_and_nothing_else(bundle: Bundle, home: Home) -> None:
    for option in ("--session", "--offload"):
        seen = home.run(*edgekv("run", bundle("demo"), *LONG, option, home.path / "mine"))
        assert seen.sockets == seen.names == []
        assert seen.outside(home.path / "mine", home.cache / "verified") == []
        assert seen.outside(home.cache / "verified") != []


def test_a_sweep_speaks_with_its_processes_over_pipes_and_leaves_its_table_and_page(home: Home) -> None:
    config, out, page = (home.path / name for name in ("config.json", "sweep.csv", "page.html"))
    config.write_text(json.dumps(LLAMA), encoding="utf-8")
    lists = ["--profiles", "android-low-4gb", "--contexts", "256,512", "-n", "2", "--workers", "2"]
    seen = home.run(*edgekv("sweep", config, *lists, "--out", out, "--page", page))
    assert seen.sockets == seen.names == []
    beside = [out.with_name(f"sweep.csv.{suffix}") for suffix in ("partial", "tmp")]
    assert seen.outside(out, page, home.tmp, *beside) == []
    assert sorted(path.name for path in home.path.iterdir() if path.suffix != ".txt") == [
        "config.json", "page.html", "sweep.csv", "tmp",
    ]  # fmt: skip
    assert list(home.tmp.iterdir()) == []


def test_a_program_with_the_inline_form_is_as_silent(bundle: Bundle, home: Home) -> None:
    inline = str(bundle("demo", form="inline"))
    program = f"""
from edgekv import Generator
with Generator.open({inline!r}) as generator:
    print("".join(generator.stream("It was", max_tokens=3)))
"""
    seen = home.run(sys.executable, "-c", program)
    assert seen.sockets == seen.names == []
    assert seen.outside(home.cache) == []


@pytest.mark.slow
def test_an_export_asks_nobody_and_leaves_a_bundle(home: Home) -> None:
    out = home.path / "demo.edgekv"
    seen = home.run(*edgekv("export", "demo", "--out", out, "--weights", "fp32", "--engine", "onnx"))
    assert [line for line in seen.sockets if "AF_UNIX" not in line] == []  # PyTorch asks the system who the user is
    assert seen.names == []
    # The folder beside it that becomes the bundle when it is whole.
    elsewhere = seen.outside(out, home.tmp)
    assert [path for path in elsewhere if not any(part.endswith(".scratch") for part in path.parts)] == []


def test_what_these_tests_look_for_is_seen(home: Home) -> None:
    seen = home.run(sys.executable, "-c", "open('deviceid', 'w'); import socket; socket.socket()")
    assert len(seen.sockets) == 1
    assert seen.outside() == [home.path / "deviceid"]
    ask = "import socket\ntry: socket.getaddrinfo('nowhere.invalid', 1)\nexcept OSError: pass"
    assert home.run(sys.executable, "-c", ask).names


def test_a_server_speaks_on_its_own_address_alone_and_writes_only_into_its_folders(bundle: Bundle, home: Home) -> None:
    program = f"""
import json, signal, subprocess, sys, urllib.request
command = [sys.executable, "-m", "edgekv", "serve", {str(bundle("demo"))!r}, "--port", "0", "--cache-dir", "mine",
    "--cache-limit", "64MiB"]
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
    url = next(word for line in server.stdout for word in line.split() if word.startswith("http://"))
    body = json.dumps({{"prompt": "It was a dark night. " * 40, "max_tokens": 5}}).encode()
    asked = urllib.request.Request(url + "/v1/completions", body, {{"Content-Type": "application/json"}})
    assert json.load(urllib.request.build_opener(urllib.request.ProxyHandler({{}})).open(asked))["choices"]
    server.send_signal(signal.SIGTERM)
    server.stdout.read()
assert server.returncode in (0, 143), server.returncode
"""
    seen = home.run(sys.executable, "-c", program)
    addresses = {found for line in seen.sockets for found in re.findall(r"sin6?_addr[^\"]*\"([^\"]+)\"", line)}
    assert addresses == {"127.0.0.1"}
    assert [line for line in seen.names if "hosts" not in line] == []
    assert seen.outside(home.path / "mine", home.cache) == []
    assert any(path.is_relative_to(home.path / "mine") for path in seen.written), "nothing would have been seen"
