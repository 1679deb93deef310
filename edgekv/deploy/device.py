"""A device that runs commands of a POSIX shell, over the system's own ``ssh`` or ``adb``: all that differs between them."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgekv.errors import DeviceLost, EdgeKVError, EngineMissing

from .target import Target

#: What the clients themselves print when a device does not answer; a command's own words begin otherwise.
_OF_ADB = ("adb: ", "error: ")
#: ssh's own exit code.
_SSH_FAILED = 255
#: A link that is silent for so long, four times, is gone.
_ALIVE_S = 15
#: A device that has not answered by then is not there.
_CONNECT_S = 20


@dataclass(frozen=True)
class Finished:
    """How a command on a device ended."""

    code: int
    stdout: bytes
    stderr: str

    @property
    def said(self) -> str:
        """Its last words, in one line."""
        return " ".join(self.stderr.split())[-600:]


@dataclass(frozen=True)
class Device:
    """``shell`` runs the command after it and tells its exit code; ``pipe`` may lose the code, and no byte of stdin."""

    name: str
    shell: Sequence[str]
    pipe: Sequence[str]

    def run(self, command: str, stdin: bytes = b"") -> Finished:
        """Run a line of shell.

        Raises:
            DeviceLost: the device does not answer.
        """
        result = subprocess.run([*self.shell, command], input=stdin, capture_output=True, check=False)
        return self._checked(result.returncode, result.stdout, result.stderr)

    def ask(self, question: str, **about: Any) -> Any:
        """Call a function of :mod:`.on_device` there, and return what it says.

        Raises:
            EdgeKVError: it failed there; the message has its last line.
            DeviceLost: as for :meth:`run`.
        """
        source = files(__package__).joinpath("on_device.py").read_bytes()
        found = self.run(f"python3 - {question} {shlex.quote(json.dumps(about))}", source)
        if found.code != 0:
            raise EdgeKVError(f"{self.name}: {(found.stderr.strip() or 'it failed').splitlines()[-1]}")
        return json.loads(found.stdout)

    def append(self, path: str, chunks: Iterable[bytes]) -> None:
        """Append bytes to a file. Whoever calls checks the file then: not every client tells when it could not be written.

        Raises:
            EdgeKVError: it cannot be written.
            DeviceLost: as for :meth:`run`.
        """
        command = [*self.pipe, f"cat >> {shlex.quote(path)}"]
        with tempfile.TemporaryFile() as words:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=words)
            assert process.stdin is not None
            try:
                with contextlib.suppress(BrokenPipeError):  # why, the other end says
                    for chunk in chunks:
                        process.stdin.write(chunk)
                    process.stdin.close()
                code = process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise
            finally:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
            words.seek(0)
            found = self._checked(code, b"", words.read())
        if found.code != 0:
            raise EdgeKVError(f"{self.name}: cannot write {path}: {found.said}; what is there stays for the next try")

    def _checked(self, code: int, stdout: bytes, stderr: bytes) -> Finished:
        found = Finished(code, stdout, stderr.decode(errors="replace"))
        if self.shell[0].endswith("adb"):
            lost = code != 0 and any(line.startswith(_OF_ADB) for line in found.stderr.splitlines())
        else:
            lost = code == _SSH_FAILED
        if lost:
            raise DeviceLost(
                f"{self.name} does not answer: {found.said or 'the connection ended'}; the same command goes on where it ended"
            )
        return found


@contextlib.contextmanager
def connect(target: Target, ssh_options: Sequence[str] = ()) -> Iterator[Device]:
    """Reach a device until the block ends.

    Args:
        ssh_options: further options as ``ssh -o`` takes them, before those of the user's configuration.

    Raises:
        DeviceLost: it does not answer, or does not let this user in.
        EngineMissing: there is no ``ssh`` or ``adb`` here.
    """
    client = shutil.which(target.transport)
    if client is None:
        package = "android-tools-adb" if target.transport == "adb" else "openssh-client"
        raise EngineMissing(f"`edgekv deploy` needs {target.transport} on this machine; install it, such as {package}")
    if target.transport == "adb":
        one = [client, *(["-s", target.address] if target.address else [])]
        yield Device(str(target), [*one, "shell", "-T"], [*one, "exec-in"])
    else:
        with _ssh(client, target, ssh_options) as device:
            yield device


@contextlib.contextmanager
def _ssh(client: str, target: Target, given: Sequence[str]) -> Iterator[Device]:
    """Hold one connection that all commands share: a password is asked once, on the terminal."""
    options = _each(
        *given,
        f"ConnectTimeout={_CONNECT_S}",
        f"ServerAliveInterval={_ALIVE_S}",
        "ServerAliveCountMax=4",
        "RemoteCommand=none",
    )
    options += ["-T", *(["-p", str(target.port)] if target.port is not None else [])]
    # The path of a socket is a hundred characters at the most, which a temporary folder of the user's own may exceed.
    parent = None if len(tempfile.gettempdir()) < 60 else "/tmp"
    with tempfile.TemporaryDirectory(prefix="edgekv-ssh-", dir=parent) as folder:
        socket, words = Path(folder, "s"), Path(folder, "words")
        shared = [client, *options, "-S", str(socket)]
        with words.open("wb") as stream:
            master = subprocess.Popen(
                [*shared, "-M", "-N", "-o", "ControlPersist=no", "--", target.host],
                stdin=subprocess.DEVNULL,
                stderr=stream,
            )
        try:
            while not socket.exists():
                if master.poll() is not None:
                    said = " ".join(words.read_text(errors="replace").split())
                    raise DeviceLost(f"{target} cannot be reached: {said or f'ssh ended with {master.returncode}'}")
                time.sleep(0.02)
            # A connection that is gone is not made anew in passing, with another question for a password: the proxy fails.
            line = [
                client,
                *_each("ProxyCommand=false", "ControlMaster=no", "LogLevel=ERROR"),
                *shared[1:],
                "--",
                target.host,
            ]
            yield Device(str(target), line, line)
        finally:
            master.terminate()
            master.wait()


def _each(*options: str) -> list[str]:
    return [part for one in options for part in ("-o", one)]
