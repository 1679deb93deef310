"""`edgekv serve` as a process: its one line, its end, and what it cannot begin with."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from .conftest import PATIENCE_S

LONG = "Once upon a time there was a river. " * 40


@contextmanager
def process(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a server and give it with its address."""
    command = [sys.executable, "-m", "edgekv", "serve", *map(str, arguments), "--port", "0"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        found = re.search(r"http://[^\s\"]+", line)
        assert found, line + (started.communicate()[1] if started.poll() is not None else "")
        yield started, found[0]
    finally:
        started.kill()
        started.communicate(timeout=PATIENCE_S)


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


def failed(*arguments: str | Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "edgekv", "serve", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    return ended.returncode, ended.stderr


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM")]
)
def test_a_signal_ends_it_in_good_order(demo: Path, number: int, code: int, said: str) -> None:
    with process(demo, "--context", "1024", "--grace", "0.2", "--model-name", "tiny") as (server, url):
        assert client(url).models.retrieve("tiny").id == "tiny"
        stream = client(url).completions.create(
            model="tiny", prompt="It was", max_tokens=1000, stream=True, logit_bias={"1": -100}
        )
        next(iter(stream))
        server.send_signal(number)
        with pytest.raises(openai.APIError, match="the server is closing"):
            for _ in stream:
                pass
        _, lines = server.communicate(timeout=PATIENCE_S)
        assert server.returncode == code
        assert lines.splitlines()[-1] == f"edgekv: {said}"
        assert "Traceback" not in lines
        requests = [line for line in lines.splitlines() if "/v1/" in line]
        assert len(requests) == 2
        assert not any("It was" in line for line in requests)


@pytest.mark.timeout(180)
def test_what_was_computed_survives_the_end_and_a_kill(demo: Path, tmp_path: Path) -> None:
    cached = []
    for number in (signal.SIGINT, signal.SIGKILL, signal.SIGINT):
        with process(demo, "--context", "1024", "--cache-dir", tmp_path / "cache", "--cache-limit", "64MiB", "-q") as (
            server,
            url,
        ):
            answer = httpx.post(
                f"{url}/v1/completions", json={"prompt": LONG, "max_tokens": 2}, timeout=PATIENCE_S
            ).json()
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            server.send_signal(number)
            server.communicate(timeout=PATIENCE_S)
    assert cached[0] == 0
    assert cached[1] == cached[2] > 0


def test_what_it_cannot_begin_with_is_one_line(demo: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("key\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, said in (
            (
                (demo, "--port", port),
                f"cannot listen on 127.0.0.1 port {port}: Address already in use; give another --port",
            ),
            ((tmp_path,), "bundle"),
            ((demo, "--api-key-file", keys), "chmod 600"),
            ((demo, "--isolate"), "--api-key-file"),
            ((demo, "--cors-origin", "example.org"), "--cors-origin must be a site"),
            ((demo, "--kv-budget", "1KiB", "--port", "0"), "budget"),
        ):
            code, line = failed(*map(str, arguments))
            assert code == 2, line
            assert line.count("\n") == 1
            assert said in line


def test_json_says_where_it_answers(demo: Path) -> None:
    with process(demo, "--context", "256", "--json", "--model-name", "tiny") as (_, url):
        assert client(url).models.retrieve("tiny").id == "tiny"


def test_everyone_may_ask_where_no_key_is_said_and_that_is_said(demo: Path) -> None:
    with process(demo, "--host", "0.0.0.0", "--context", "256") as (server, url):
        port = url.rpartition(":")[2]
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=PATIENCE_S).status_code == 200
        server.send_signal(signal.SIGINT)
        _, lines = server.communicate(timeout=PATIENCE_S)
        assert lines.startswith("edgekv: everyone who reaches 0.0.0.0 may ask; --api-key-file names those who may\n")


def test_without_the_extra_it_says_how_to_get_it(demo: Path) -> None:
    code = "import sys; sys.modules['fastapi'] = None; from edgekv.__main__ import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code, "serve", str(demo)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr == "edgekv: `edgekv serve` needs fastapi: pip install 'edgekv[serve]'\n"
