"""A real sshd on loopback, behind which stands a device: an own home, and a python3 that has no package of ours."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgekv.deploy.device import Device, connect
from edgekv.deploy.target import Target, parse_target

from .wheels import make_own_wheel, make_wheel, needed

_SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
_CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PidFile none
PermitRootLogin yes
ForceCommand exec env -i HOME={home} PATH={bin}:/usr/bin:/bin {sh} -c "$SSH_ORIGINAL_COMMAND"
"""
#: Tries, a tenth of a second apart, until it answers.
_TRIES = 100


@dataclass(frozen=True)
class Board:
    """A device that answers on loopback. ``bin`` is first on its PATH; ``sshd`` is the process that listens."""

    target: Target
    options: tuple[str, ...]
    home: Path
    bin: Path
    sshd: int
    python: Path

    @property
    def arguments(self) -> list[str]:
        """What the command needs to reach it."""
        return [str(self.target), *(part for one in self.options for part in ("--ssh-option", one))]

    def shim(self, name: str, script: str) -> None:
        """Put a command in front of the system's own."""
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)


@pytest.fixture(scope="session")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """An sshd of this user, on a free port, with keys of its own."""
    if _SSHD is None or shutil.which("ssh") is None:
        pytest.skip("needs sshd and ssh: install openssh-server")
    folder = tmp_path_factory.mktemp("board")
    home, programs = folder / "home", folder / "bin"
    home.mkdir()
    programs.mkdir()
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "config"
    config.write_text(_CONFIG.format(port=port, folder=folder, home=home, bin=programs, sh="/bin/sh"))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([_SSHD, "-D", "-e", "-f", str(config)], stderr=log)
    options = (
        f"IdentityFile={folder}/key", "IdentitiesOnly=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null",
        "BatchMode=yes",
    )  # fmt: skip
    base = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    found = Board(parse_target(f"{getpass.getuser()}@127.0.0.1:{port}"), options, home, programs, process.pid, base)
    # This Python without its packages: -S leaves out every site-packages, so that only what was deployed is found.
    found.shim("python3", f'exec {base} -S "$@"')
    try:
        for _ in range(_TRIES):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield found
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def device(board: Board) -> Iterator[Device]:
    """A connection to the board."""
    with connect(board.target, board.options) as found:
        yield found


@pytest.fixture
def shim(board: Board) -> Iterator[Callable[[str, str], None]]:
    """Put commands in front of the device's own for one test."""
    before = {path: path.read_bytes() for path in board.bin.iterdir()}
    yield lambda name, script: board.shim(name, script)
    for path in board.bin.iterdir():
        if path in before:
            path.write_bytes(before[path])
        else:
            path.unlink()


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheels of edgekv and all that it needs, from which pip takes them instead of from a network."""
    folder = tmp_path_factory.mktemp("index")
    for found in needed("edgekv", "serve"):
        make_wheel(found, folder)
    return folder


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with edgekv's own wheel."""
    return make_own_wheel(tmp_path_factory.mktemp("dist")).parent
