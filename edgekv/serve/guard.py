"""Stands before every route: who may ask, from where, and how much; and the line of the access log."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import time
import traceback
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgekv.schema import printable

from .errors import ApiError
from .face import Face

_log = logging.getLogger("edgekv.serve.access")
_faults = logging.getLogger("edgekv.serve")

#: Seconds in which a body must come.
_BODY_S = 60.0

#: Anyone may see that it is there, and the page, which asks for a key itself.
_OPEN_PATHS = ("/", "/health")
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Hosts:
    """The names by which clients may call the server.

    A page of another site may have its name lead to this machine (DNS rebinding), so that the browser takes this server for its
    own; the name is then the other site's. An address cannot be led elsewhere.
    """

    def __init__(self, host: str, more: Iterable[str]) -> None:
        own = socket.gethostname().lower()
        loopback = is_loopback(host)
        self._addresses = not loopback
        self._names = {*_LOOPBACK_NAMES, host.lower().strip("[]"), *(name.lower().strip("[]") for name in more)}
        self._names |= set() if loopback else {own, f"{own}.local"}

    def known(self, header: str) -> bool:
        """Return whether a Host header names this server."""
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._addresses


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, face: Face) -> None:
        self._app = app
        self._face = face
        self._hosts = Hosts(face.options.host, face.options.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return
        started, status, counters = time.perf_counter(), 500, self._face.counters
        left, whole = self._face.options.body_bytes, False

        async def limited() -> Message:
            nonlocal left, whole
            if whole:  # what comes now is that the client is gone, whenever that is
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(started + _BODY_S - time.perf_counter(), 0.001))
            except asyncio.TimeoutError as error:
                raise HTTPException(408, f"the body did not come within {_BODY_S:g} s") from error
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, self._too_large())
            whole = not message.get("more_body", False)
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            request = Request(scope)
            try:
                self._check(request)
            except ApiError as error:
                await JSONResponse(error.body(), error.status, error.headers())(scope, receive, noted)
                return
            await self._app(scope, limited, noted)
        except Exception as error:
            # Without its message, which may quote what was asked. The client was told, or finds its answer cut off.
            trace = "".join(traceback.format_tb(error.__traceback__))
            name = type(error).__name__
            _faults.error("a request ended with an error of edgekv itself, %s, please report it:\n%s", name, trace)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - started
            counters.responses[route, status] += 1
            counters.seconds[route] += seconds
            end = getattr(scope.get("edgekv.answering"), "end", None)
            tokens = (
                f", {end.prompt_tokens} + {end.completion_tokens} tokens, {end.cached_tokens} cached" if end else ""
            )
            _log.info("%s %s %d, %.3f s%s", scope["method"], printable(scope["path"][:100]), status, seconds, tokens)

    def _check(self, request: Request) -> None:
        options, headers = self._face.options, request.headers
        host = headers.get("host", "")
        if not self._hosts.known(host):
            raise ApiError(
                403, f"this server is not called {printable(host[:100])!r}; allow it with --allow-host", code="host"
            )
        origin = headers.get("origin")
        if origin is not None and origin not in options.cors_origins and urlsplit(origin).netloc != host:
            raise ApiError(
                403,
                f"pages of {printable(origin[:100])!r} may not ask here; allow it with --cors-origin",
                code="origin",
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and (len(length) > 18 or int(length) > options.body_bytes):
            raise ApiError(413, self._too_large(), code="too_large")
        if options.keys and request.url.path not in _OPEN_PATHS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            shown = key.strip().encode()
            if scheme.lower() != "bearer" or not options.keys.known(shown):
                raise ApiError(401, "a key of this server is needed: Authorization: Bearer KEY", code="invalid_api_key")
            request.scope["edgekv.key"] = shown

    def _too_large(self) -> str:
        return f"the body is larger than {self._face.options.body_bytes} bytes; the server's --body-limit decides"
