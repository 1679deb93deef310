"""A checkpoint by its name: a server that speaks as much of the hub as its library asks for, on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edgekv.bundle import read_manifest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "some-owner/Some-Model.1"


class Hub(ThreadingHTTPServer):
    """Serves one repository from a folder; ``asked``: the paths of all requests."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Repository)
        self.folder, self.asked = folder, list[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Repository(BaseHTTPRequestHandler):
    """Model information, the list of files, and the files."""

    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        files = {file.name: file for file in self.server.folder.iterdir()}
        if path in (f"/api/models/{NAME}/revision/main", f"/api/models/{NAME}"):
            self.answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}))
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            rows = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": _id(f)} for n, f in files.items()]
            self.answer(json.dumps(rows))
        elif path.startswith(f"/{NAME}/resolve/") and path.rpartition("/")[2] in files:
            file = files[path.rpartition("/")[2]]
            self.answer(file.read_bytes(), {"ETag": f'"{_id(file)}"', "X-Repo-Commit": COMMIT})
        elif path.startswith("/api/models/gated/"):
            self.answer("{}", {"X-Error-Code": "GatedRepo"}, 403)
        elif path.startswith(f"/api/models/{NAME}/revision/"):
            self.answer("{}", {"X-Error-Code": "RevisionNotFound"}, 404)
        elif path.startswith(f"/{NAME}/resolve/"):
            self.answer("{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, 404)
        else:
            self.answer("{}", {"X-Error-Code": "RepoNotFound"}, 404)

    def answer(self, body: str | bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def _id(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[Hub]:
    folder = Path(shutil.copytree(checkpoint("llama-tied"), tmp_path / "repository"))
    for other in ("consolidated.safetensors", "pytorch_model.bin", "model.onnx"):
        (folder / other).write_bytes(b"the same weights once more")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(code: list[str], home: Path, hub: Hub, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_HOME": str(home / "hub"),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        **more,
    }
    return subprocess.run([sys.executable, *code], capture_output=True, text=True, env=environment, cwd=home)


def fetch(source: str, home: Path, hub: Hub, **more: str) -> subprocess.CompletedProcess[str]:
    return run(
        ["-c", f"from edgekv.export.hub import fetch_source; print(fetch_source({source!r}))"], home, hub, **more
    )


@pytest.mark.slow
def test_a_name_on_the_hub_is_exported_as_its_folder_is_and_needs_the_hub_once(
    hub: Hub, checkpoint: Callable[[str], Path], bundle: Callable[..., Path], tmp_path: Path
) -> None:
    result = run(["-m", "edgekv", "export", NAME, "--out", "made", "--weights", "fp32"], tmp_path, hub)
    assert result.returncode == 0, result.stderr
    assert read_manifest(tmp_path / "made").files == read_manifest(bundle(checkpoint("llama-tied"))).files
    assert not [path for path in hub.asked if path.endswith((".bin", ".onnx", "consolidated.safetensors"))]
    hub.asked.clear()
    again = fetch(NAME, tmp_path, hub, HF_HUB_OFFLINE="1")
    assert (Path(again.stdout.strip()) / "model.safetensors").is_file(), again.stderr
    assert hub.asked == []


@pytest.mark.parametrize(
    ("source", "more", "said"),
    [
        ("nobody/nothing", {}, "is no folder or file here, and the Hugging Face hub has no such model"),
        pytest.param("gated/model", {}, "asks for a licence to be accepted", marks=pytest.mark.slow),
        pytest.param(f"{NAME}@other", {}, "has the model, but not this revision or file", marks=pytest.mark.slow),
        pytest.param(
            f"{NAME}/model-Q8_0.gguf", {}, "has the model, but not this revision or file", marks=pytest.mark.slow
        ),
        pytest.param(
            NAME,
            {"HF_HUB_OFFLINE": "1"},
            "was not downloaded before, and the Hugging Face hub cannot be reached",
            marks=pytest.mark.slow,
        ),
        (NAME, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hugging Face hub cannot be reached"),
    ],
)
def test_what_the_hub_does_not_give_is_an_error_that_says_so(
    source: str, more: dict[str, str], said: str, hub: Hub, tmp_path: Path
) -> None:
    result = fetch(source, tmp_path, hub, **more)
    assert f"edgekv.errors.CheckpointError: {source}" in result.stderr.splitlines()[-1]
    assert said in result.stderr.splitlines()[-1]


def test_what_would_lie_in_a_folder_that_is_here_is_never_asked_for(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    assert fetch("models/llama", tmp_path, hub).stdout == "models/llama\n"
    assert hub.asked == []
