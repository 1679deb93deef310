"""The process side: a socket, uvicorn on a thread of its own, and an end in good order."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import threading
import time

import uvicorn
from starlette.types import ASGIApp

from edgekv.errors import EdgeKVError, UsageError

from .app import build
from .face import Face

#: Connections at once; more are told to come again, before any of their bytes cost memory.
_MOST_CONNECTIONS = 512
#: Seconds for what was cancelled to tell its client so.
_LAST_WORDS_S = 2.0


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that has an address, so that nobody else takes it while the model is loaded; port 0: any free one.

    Raises:
        UsageError: there is no such host, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"cannot listen on {host!r}: {getattr(error, 'strerror', None) or error}; give --host an address of this machine"
        ) from error
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror}; give another --port, or --port 0 for a free one"
        ) from error
    return listener


def address_of(listener: socket.socket, host: str) -> str:
    """Return the URL of a socket, as a person on this machine types it."""
    port = listener.getsockname()[1]
    with contextlib.suppress(ValueError):
        found = ipaddress.ip_address(host.strip("[]"))
        host = f"[{found}]" if found.version == 6 else str(found)
    return f"http://{host}:{port}"


class Server:
    """Answers on a socket, from a thread of its own.

    Raises (from the constructor):
        EdgeKVError: it does not begin.
    """

    def __init__(self, face: Face, listener: socket.socket) -> None:
        self._face = face
        self._uvicorn = uvicorn.Server(_config(build(face)))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(listener,), name="edgekv-http", daemon=True)
        self._thread.start()
        while not (self._uvicorn.started or self._ended.is_set()):
            time.sleep(0.01)
        if self._ended.is_set():
            raise EdgeKVError("the HTTP server did not begin; edgekv --verbose serve shows why")

    def _run(self, listener: socket.socket) -> None:
        try:
            self._uvicorn.run([listener])
        finally:
            self._ended.set()

    def wait(self) -> None:
        """Wait until it ends, or until a signal of this process says otherwise."""
        self._ended.wait()

    def close(self, grace_s: float) -> None:
        """Take nothing new, let answers go on for a while, cancel the rest, and end."""
        face = self._face
        face.closing = True
        until = time.monotonic() + grace_s
        while face.answering and time.monotonic() < until:
            time.sleep(0.02)
        for answering in list(face.answering):
            answering.cancel()
        self._uvicorn.should_exit = True
        self._thread.join()
        face.close()


def _config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", interface="asgi3", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, limit_concurrency=_MOST_CONNECTIONS, timeout_keep_alive=30,
        timeout_graceful_shutdown=int(_LAST_WORDS_S),
    )  # fmt: skip
