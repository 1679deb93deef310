"""A server in this process, on a port of its own, and clients of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from edgekv.runtime.options import RunOptions
from edgekv.runtime.serving.service import Service, ServiceOptions
from edgekv.serve.face import Face
from edgekv.serve.options import FaceOptions
from edgekv.serve.server import Server, address_of, listen

Bundle = Callable[..., Path]
#: No answer of the tiny model takes as long.
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Place:
    """A server that answers, and how to reach it."""

    url: str
    face: Face
    service: Service
    server: Server

    def client(self, key: str = "none", **more: Any) -> openai.OpenAI:
        """Return the official client; it tries once."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        """Send JSON."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=PATIENCE_S, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        """Ask."""
        return httpx.get(f"{self.url}{path}", timeout=PATIENCE_S, **more)


@contextmanager
def serving(
    bundle: Path, *, parallel: int = 2, queue: int = 32, context: int = 1024, kv_budget: str | None = None, **face: Any
) -> Iterator[Place]:
    """Serve a bundle until the block ends."""
    run = RunOptions(kv_budget=kv_budget, context=context, threads=1)
    with listen("127.0.0.1", 0) as listener:
        service = Service(bundle, ServiceOptions(run, parallel=parallel, queue=queue))
        try:
            shown = Face(service, bundle, FaceOptions(**{"names": ("demo", "other"), **face}))
            server = Server(shown, listener)
            try:
                yield Place(address_of(listener, "127.0.0.1"), shown, service, server)
            finally:
                server.close(0)
        finally:
            service.close()


@pytest.fixture(scope="session")
def demo(bundle: Bundle) -> Path:
    """The bundled model."""
    return bundle("demo")


@pytest.fixture(scope="session")
def place(demo: Path) -> Iterator[Place]:
    """A server that all tests of this process may ask."""
    with serving(demo) as found:
        yield found


@pytest.fixture(scope="session")
def with_template(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the bundled model the chat template of another one."""

    def get(name: str) -> Path:
        folder = tmp_path_factory.mktemp("template") / f"{name}.edgekv"
        shutil.copytree(demo, folder)
        source = Path(__file__).parents[1] / "chat_templates" / f"{name}.jinja"
        template = folder / "chat_template.jinja"
        shutil.copy(source, template)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        data = template.read_bytes()
        manifest["files"][template.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        return folder

    return get
