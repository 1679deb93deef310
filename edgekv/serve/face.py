"""What the routes share: the service, who is being answered, and how a request becomes one of the runtime."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import edgekv
from edgekv.errors import EdgeKVError
from edgekv.runtime.serving.request import Event, Failed, Finished, Reading, Request
from edgekv.runtime.serving.service import Service

from .calls import Way, way_of
from .errors import ApiError, closing, told
from .metrics import Counters
from .options import FaceOptions

if TYPE_CHECKING:
    from .grammar import Grammars

T = TypeVar("T")

#: Seconds without news after which a stream says that it is still there.
PULSE_S = 10.0


class Answering:
    """A request that was taken, and what comes of it.

    Attributes:
        end: what was told of the whole answer; None: it is not over, or failed.
    """

    end: Finished | None = None

    def __init__(self, face: Face, request: Request) -> None:
        loop = asyncio.get_running_loop()
        self._face = face
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._until = loop.time() + face.options.request_timeout_s

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._ticket = face.service.submit(request, deliver)

    def cancel(self) -> None:
        """Let it end; nothing happens where it has ended."""
        self._ticket.cancel()
        self._face.answering.discard(self)

    async def events(self) -> AsyncIterator[Event | None]:
        """Give what comes, to Finished; None when nothing came for a while.

        Raises:
            ApiError: it failed, took too long, or the server is closing.
        """
        loop, limit = asyncio.get_running_loop(), self._face.options.request_timeout_s
        while True:
            left = self._until - loop.time()
            if left <= 0:
                raise ApiError(408, f"the answer took longer than {limit:g} s; ask for fewer tokens", code="timeout")
            try:
                event = await asyncio.wait_for(self._events.get(), min(left, PULSE_S))
            except asyncio.TimeoutError:
                yield None
                continue
            if isinstance(event, Failed):
                raise told(event.error)
            if isinstance(event, Finished):
                if event.reason == "cancelled":
                    raise closing()
                self.end = event
                yield event
                return
            if not isinstance(event, Reading):
                yield event


class Face:
    """A service that is asked over HTTP.

    Attributes:
        closing: no new requests are taken.
        answering: the requests that are not answered yet.
        way: how the model of this bundle calls tools; None: it does not.
    """

    def __init__(self, service: Service, bundle: Path, options: FaceOptions) -> None:
        self.service = service
        self.bundle = bundle
        self.options = options
        self.closing = False
        self.answering: set[Answering] = set()
        self.counters = Counters()
        self.created = int((bundle / "manifest.json").stat().st_mtime)
        facts = f"{edgekv.__version__} {service.manifest.source_sha256} {service.manifest.weights} {service.manifest.engine}"
        self.fingerprint = f"edgekv-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
        # One thread reads texts: a tokenizer is for one at a time, and a long text must not stop the streams of others.
        self._reader = ThreadPoolExecutor(1, "edgekv-text")

    @property
    def name(self) -> str:
        """Of the model, as answers tell it."""
        return self.options.names[0]

    @functools.cached_property
    def way(self) -> Way | None:
        """How the model of this bundle calls tools; None: it does not."""
        return way_of(self.service.text)

    @functools.cached_property
    def grammars(self) -> Grammars:
        """The tokenizer, as grammars need it.

        Raises:
            UsageError: llguidance does not understand it.
        """
        from .grammar import Grammars

        manifest = self.service.manifest
        return Grammars(self.bundle / manifest.tokenizer, manifest.model.vocab_size, manifest.model.eos_token_ids)

    async def read(self, work: Callable[[], T]) -> T:
        """Do what needs the tokenizer, on the thread for it.

        Raises:
            ApiError: the work raised an error of the runtime.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, work)
        except EdgeKVError as error:
            raise told(error) from error

    def ask(self, request: Request) -> Answering:
        """Give a request to the service.

        Raises:
            ApiError: it is not taken.
        """
        if self.closing:
            raise closing()
        try:
            answering = Answering(self, request)
        except EdgeKVError as error:
            raise told(error) from error
        self.answering.add(answering)
        return answering

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served.

        Raises:
            ApiError: it is none of the names.
        """
        if name is not None and name not in self.options.names:
            known = ", ".join(self.options.names)
            raise ApiError(
                404,
                f"the model {name[:100]!r} is not served here; this is {known}",
                param="model",
                code="model_not_found",
            )

    def close(self) -> None:
        """Free what the face itself holds; the service is the caller's."""
        self._reader.shutdown()
