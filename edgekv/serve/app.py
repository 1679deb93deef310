"""The routes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

import edgekv
from edgekv.runtime.serving.snapshot import Snapshot

from . import metrics, questions
from .errors import ApiError, closing, not_valid
from .face import Face
from .guard import Guard
from .page import CONTENT_SECURITY_POLICY, PAGE
from .replies import ChatAnswer, CompletionAnswer, event_stream
from .wire import (
    ChatQuestion,
    ChatReply,
    CompletionQuestion,
    CompletionReply,
    EmbeddingQuestion,
    ErrorReply,
    ModelCard,
    ModelList,
    Question,
)

T = TypeVar("T")
Asks = TypeVar("Asks", bound=Question)

#: What nginx calls a client that is gone; nobody receives it.
_CLIENT_IS_GONE = 499
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request is not answered."},
    "5XX": {"model": ErrorReply, "description": "The answer failed, or the server is closing."},
}


def build(face: Face) -> ASGIApp:
    """Return the application that answers for a service."""
    app = FastAPI(
        title="edgekv",
        version=edgekv.__version__,
        description="One model behind the OpenAI API.",
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
        responses=_ERRORS,
    )
    _add_questions(app, face)
    _add_facts(app, face)
    _add_errors(app)
    guarded: ASGIApp = Guard(app, face)
    if face.options.cors_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=face.options.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type"),
        )
    return guarded


class _Stream(StreamingResponse):
    """A stream whose request is cancelled when it ends, however that is: the client is gone, too."""

    def __init__(self, forms: ChatAnswer | CompletionAnswer, *, with_usage: bool) -> None:
        super().__init__(
            event_stream(forms.parts(), with_usage=with_usage),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
        self._answering = forms.answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answering.cancel()


async def _reply(request: Request, body: Question, forms: ChatAnswer | CompletionAnswer) -> Response:
    """Answer: as a stream, or at once when all is said, unless the client is gone by then."""
    request.scope["edgekv.answering"] = forms.answering
    if body.stream:
        return _Stream(forms, with_usage=bool(body.stream_options and body.stream_options.include_usage))
    try:
        whole = await _while_listened_to(request, forms.whole())
    finally:
        forms.answering.cancel()
    return JSONResponse(whole) if whole is not None else Response(status_code=_CLIENT_IS_GONE)


async def _while_listened_to(request: Request, work: Awaitable[T]) -> T | None:
    """Return what the work gives, or None: the client is gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


def _owner(face: Face, request: Request) -> bytes:
    """Return whose pages a request may share: everyone's, or those of its key alone."""
    key = request.scope.get("edgekv.key", b"")
    return hashlib.sha256(key).digest() if face.options.isolate else b""


def _add_questions(app: FastAPI, face: Face) -> None:
    async def answered(
        request: Request,
        body: Asks,
        prepare: Callable[[Face, Asks, bytes], questions.Prepared],
        forms: type[ChatAnswer | CompletionAnswer],
    ) -> Response:
        face.check_model(body.model)
        owner = _owner(face, request)
        prepared = await face.read(lambda: prepare(face, body, owner))
        return await _reply(request, body, forms(face, face.ask(prepared.request), prepared))

    @app.post("/v1/chat/completions", responses={200: {"model": ChatReply}})
    async def chat(request: Request, body: ChatQuestion) -> Response:
        """Answer in a conversation."""
        return await answered(request, body, questions.chat, ChatAnswer)

    @app.post("/v1/completions", responses={200: {"model": CompletionReply}})
    async def complete(request: Request, body: CompletionQuestion) -> Response:
        """Go on with a text."""
        return await answered(request, body, questions.completion, CompletionAnswer)

    @app.post("/v1/embeddings")
    async def embed(body: EmbeddingQuestion) -> Response:
        """Refuse: a model that writes text has no embeddings to give."""
        raise ApiError(400, f"{face.name} writes text; this server has no embeddings", code="embeddings_not_supported")


def _add_facts(app: FastAPI, face: Face) -> None:
    def card(name: str) -> ModelCard:
        context = face.service.context
        return {"id": name, "object": "model", "created": face.created, "owned_by": "edgekv", "context_length": context}

    @app.get("/v1/models")
    async def models() -> ModelList:
        """List the names of the model."""
        return {"object": "list", "data": [card(name) for name in face.options.names]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelCard:
        """Tell of the model."""
        face.check_model(model)
        return card(model)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say whether requests are taken."""
        if face.closing:
            raise closing()
        return {"status": "ok"}

    @app.get("/v1/edgekv/snapshot")
    async def snapshot() -> Snapshot:
        """Tell what the service is doing: of pages, never of what they hold."""
        return face.service.snapshot()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Tell Prometheus."""
        return Response(metrics.text(face.counters, face.service.snapshot()), media_type=metrics.CONTENT_TYPE)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        """Show the page."""
        return HTMLResponse(
            PAGE, headers={"content-security-policy": CONTENT_SECURITY_POLICY, "cache-control": "no-cache"}
        )


def _add_errors(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body(), error.status, error.headers())

    async def not_understood(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        kinds: dict[str, type[Question]] = {"/v1/chat/completions": ChatQuestion, "/v1/completions": CompletionQuestion}
        kind = kinds.get(request.url.path, Question)
        return await refused(request, not_valid(error.errors(), list(kind.model_fields)))

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = (
            f"there is no {request.method} {request.url.path[:100]} here"
            if error.status_code in (404, 405)
            else str(error.detail)
        )
        answer = await refused(request, ApiError(error.status_code, said))
        answer.headers.update(error.headers or {})
        return answer

    async def fault(request: Request, error: Exception) -> Response:
        return await refused(request, ApiError(500, "an error of edgekv itself; the server's log has more"))

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        ApiError: refused,
        RequestValidationError: not_understood,
        HTTPException: of_http,
        Exception: fault,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
