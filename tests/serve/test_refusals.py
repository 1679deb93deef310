"""What is refused, in the form that clients of the OpenAI API understand; and who is."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from edgekv.errors import UsageError
from edgekv.serve.guard import Hosts
from edgekv.serve.options import FaceOptions, Keys
from edgekv.serve.server import listen

from .conftest import PATIENCE_S, Place, serving

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
LONG: dict[str, Any] = {"prompt": "It was", "max_tokens": 900, "logit_bias": {"1": -100}}


@pytest.mark.parametrize(
    ("more", "param", "said"),
    [
        ({"temprature": 1}, "temprature", 'did you mean "temperature"?'),
        ({"n": 2}, "n", "n must be 1"),
        ({"temperature": "hot"}, "temperature", "temperature: input should be a valid number, not 'hot'"),
        ({"temperature": 1e9}, "temperature", "less than or equal to 100"),
        ({"temperature": None, "messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "function", "content": "a"}]}, "messages[0].role", "'system', 'developer'"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "a message of the role user needs a content"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0]", "needs the tool_call_id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "a part of the type 'image_url' is refused: the model of this server reads text only",
        ),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4 items"),
        ({"max_completion_tokens": 3}, None, "two names of one limit"),
        ({"top_logprobs": 3}, None, "top_logprobs goes with logprobs: true only"),
        ({"stream_options": {"include_usage": True}}, None, "stream_options goes with stream: true only"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "'99999999' is no token"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1' is no token"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not understood"),
        ({"functions": []}, "functions", "replaced by tools"),
        ({"tool_choice": "required"}, None, "there are no tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "the chat template of demo does not know tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema goes with the type json_schema"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_met_is_refused_by_name(place: Place, more: Any, param: str | None, said: str) -> None:
    answer = place.post(CHAT, HELLO | more)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"echo": True}, "echo is refused"),
        ({"suffix": "end"}, "suffix is refused"),
        ({"best_of": 3}, "best_of must be 1"),
        ({"prompt": ["a", "b"]}, "prompt must be one prompt"),
        ({"prompt": [10**9]}, "a token must be a whole number from 0 to"),
        ({"prompt": ["a"] * 0}, None),
        ({"prompt": None}, "prompt"),
    ],
)
def test_a_completion_is_refused_by_name_too(place: Place, more: Any, said: str | None) -> None:
    answer = place.post("/v1/completions", {"prompt": "It was", "max_tokens": 1} | more)
    if said is None:
        assert answer.status_code == 200, "an empty prompt begins with the token that begins a text"
    else:
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(place: Place) -> None:
    with pytest.raises(
        openai.BadRequestError, match=r"a prompt of \d+ tokens does not fit the context of 1024"
    ) as caught:
        place.client().completions.create(model="demo", prompt="a " * 3000)
    assert caught.value.code == "context_length_exceeded"


def test_a_text_that_cannot_fit_however_it_is_cut_is_refused_before_it_is_cut(place: Place) -> None:
    text = "zq " * 1_000_000
    for path, body in (
        ("/v1/completions", {"prompt": text}),
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
    ):
        answer = place.post(path, body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert "3000000 characters do not fit the context of" in answer.json()["error"]["message"]
    long = place.post("/v1/completions", {"prompt": "It was", "stop": "x" * 1001})
    assert (long.status_code, "at most 1000 characters" in long.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    "schema", [{"const": 10**40}, {"const": "\udfff"}, {"$ref": "#"}, {"const": float("nan")}], ids=repr
)
def test_a_schema_that_cannot_be_kept_to_is_no_fault_of_the_server(place: Place, schema: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = json.dumps({**HELLO, "response_format": wanted})  # as no library would send it
    answer = place.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert len(answer.json()["error"]["message"]) < 500


def test_no_max_tokens_and_null_are_the_same(place: Place) -> None:
    answers = [
        place.post("/v1/completions", {"prompt": "It was", **more}).json() for more in ({}, {"max_tokens": None})
    ]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [16, 16]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"a"', b"\xff", b"[" * 100_000, b'{"messages": ' + b"9" * 5000 + b"}"]
)
def test_a_body_that_is_no_question_is_refused(place: Place, body: bytes) -> None:
    answer = httpx.post(
        f"{place.url}{CHAT}", content=body, headers={"content-type": "application/json"}, timeout=PATIENCE_S
    )
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    plain = httpx.post(f"{place.url}{CHAT}", content=json.dumps(HELLO), timeout=PATIENCE_S)
    assert "Content-Type: application/json" in plain.json()["error"]["message"]


def test_text_that_utf8_cannot_spell_is_refused(place: Place) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    answer = httpx.post(
        f"{place.url}{CHAT}", content=body, headers={"content-type": "application/json"}, timeout=PATIENCE_S
    )
    assert answer.status_code == 400


def test_a_place_that_is_not_there_is_said_in_the_same_form(place: Place) -> None:
    assert place.get("/v1/nothing").json()["error"]["message"] == "there is no GET /v1/nothing here"
    answer = place.get(CHAT)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert place.get("/openapi.json").json()["info"]["title"] == "edgekv"
    assert place.get("/health").json() == {"status": "ok"}


def test_a_key_is_asked_for_everywhere_but_at_the_door(demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one-key\nanother-key\n")
    path.chmod(0o600)
    with serving(demo, parallel=1, keys=Keys.read(path), isolate=True) as place:
        assert place.client("another-key").models.list().data
        for key in ("wrong", "one-ke", "one-key2"):
            with pytest.raises(openai.AuthenticationError, match="a key of this server is needed"):
                place.client(key).models.list()
        for open_path in ("/", "/health"):
            assert place.get(open_path).status_code == 200
        for closed in ("/metrics", "/openapi.json", "/v1/edgekv/snapshot", "/nothing"):
            assert place.get(closed).status_code == 401
        assert place.post(CHAT, HELLO).headers["www-authenticate"] == "Bearer"
        ask: dict[str, Any] = {"model": "demo", "prompt": "Once upon a time there was a river. " * 40, "max_tokens": 1}
        usages = [
            place.client(key).completions.create(**ask).usage for key in ("one-key", "another-key", "another-key")
        ]
        details = [usage.prompt_tokens_details for usage in usages if usage is not None]
        cached = [detail.cached_tokens or 0 for detail in details if detail is not None]
        assert cached[:2] == [0, 0], "what one key asked is not told to another by the time"
        assert cached[2] > 0


def test_a_comment_in_a_key_file_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# mine\nsk-1\n\n")
    path.chmod(0o600)
    keys = Keys.read(path)
    assert keys.known(b"sk-1")
    assert not keys.known(b"# mine")
    path.write_text("sk 1\n")
    with pytest.raises(UsageError, match="without blanks"):
        Keys.read(path)


def test_a_key_file_that_others_may_read_or_that_holds_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("key\n")
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        Keys.read(path)
    path.chmod(0o600)
    assert Keys.read(path).known(b"key")
    path.write_text("\n")
    with pytest.raises(UsageError, match="must hold keys"):
        Keys.read(path)
    with pytest.raises(UsageError, match="cannot read"):
        Keys.read(tmp_path / "none")
    with pytest.raises(UsageError, match="--api-key-file"):
        FaceOptions(("demo",), isolate=True)


def test_a_page_of_another_site_may_not_ask_unless_it_is_named(demo: Path, place: Place) -> None:
    port = place.url.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "10.0.0.1", "127.0.0.1.evil.example", ""):
        refused = place.get("/v1/models", headers={"host": host})
        assert refused.status_code in (400, 403), host
    for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}"):
        assert place.get("/v1/models", headers={"host": host}).status_code == 200
    for origin in ("https://evil.example", "null", "http://localhost:1"):
        assert place.post(CHAT, HELLO, headers={"origin": origin}).status_code == 403
    own = place.post(CHAT, HELLO, headers={"origin": place.url})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers
    with serving(demo, parallel=1, cors_origins=("https://good.example",), allowed_hosts=("hub.lan",)) as named:
        headers = {"origin": "https://good.example"}
        assert named.post(CHAT, HELLO, headers=headers).headers["access-control-allow-origin"] == "https://good.example"
        asked = {**headers, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        assert httpx.options(f"{named.url}{CHAT}", headers=asked).status_code == 200
        assert named.post(CHAT, HELLO, headers={"origin": "https://evil.example"}).status_code == 403
        assert named.get("/v1/models", headers={"host": "hub.lan"}).status_code == 200


def test_beyond_loopback_addresses_and_the_own_name_are_known_and_other_names_are_not() -> None:
    hosts = Hosts("0.0.0.0", ["hub.lan"])
    known = (
        "192.168.1.7:8080",
        "[fe80::1]:80",
        "hub.lan",
        "localhost",
        socket.gethostname(),
        f"{socket.gethostname()}.local",
    )
    assert all(map(hosts.known, known))
    assert not any(
        map(hosts.known, ("evil.example", "192.168.1.7.evil.example", "", "[", "a@b", "192.168.1.7@evil.example"))
    )
    assert not Hosts("127.0.0.1", []).known("192.168.1.7")


def test_a_body_that_is_too_large_is_refused_whether_or_not_it_says_so(demo: Path) -> None:
    with serving(demo, parallel=1, body_bytes=2000) as place:
        body = json.dumps({"prompt": "a" * 3000}).encode()
        for content in (body, iter([body[:1500], body[1500:]])):
            headers = {"content-type": "application/json"}
            answer = httpx.post(f"{place.url}/v1/completions", content=content, headers=headers, timeout=PATIENCE_S)
            assert answer.status_code == 413
            assert "larger than 2000 bytes" in answer.json()["error"]["message"]


def test_a_request_that_takes_too_long_is_ended_as_its_client_can_understand(demo: Path) -> None:
    with serving(demo, parallel=1, request_timeout_s=1.0) as place:
        # One that is never read: the service is stopped where it delivers.
        hold = threading.Event()
        place.service.submit(_slow_request(place), _held(hold))
        try:
            with pytest.raises(openai.APIStatusError, match="the answer took longer than 1 s") as caught:
                place.client().completions.create(model="demo", prompt="It was", max_tokens=2)
            assert caught.value.status_code == 408
            with pytest.raises(openai.APIError, match="the answer took longer than 1 s"):
                list(place.client().completions.create(model="demo", prompt="It was", max_tokens=2, stream=True))
        finally:
            hold.set()


def test_more_requests_than_may_wait_are_told_to_come_again(demo: Path) -> None:
    with serving(demo, parallel=1, queue=1) as place:
        hold = threading.Event()
        place.service.submit(_slow_request(place), _held(hold))
        try:
            _until(lambda: not place.service.snapshot().waiting)
            threading.Thread(target=place.post, args=("/v1/completions", LONG), daemon=True).start()
            _until(lambda: bool(place.face.answering))
            answer = place.post("/v1/completions", LONG)
            assert answer.status_code == 429
            assert answer.headers["retry-after"].isdecimal()
            assert answer.json()["error"]["type"] == "rate_limit_error"
        finally:
            hold.set()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(demo: Path, stream: bool) -> None:
    with serving(demo, parallel=1) as place:
        body = json.dumps(LONG | {"stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", int(place.url.rpartition(":")[2]))) as client:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            _until(lambda: bool(place.face.answering))
            if stream:
                assert client.recv(100)
        began = time.monotonic()
        _until(lambda: not place.face.answering)
        assert place.post("/v1/completions", {"prompt": "It was", "max_tokens": 1}).status_code == 200
        assert time.monotonic() - began < PATIENCE_S / 4
        assert place.service.snapshot().requests.get("cancelled") == 1


def test_a_server_that_closes_says_so_to_those_who_ask_and_those_who_listen(demo: Path) -> None:
    with serving(demo, parallel=1) as place:
        stream = place.client().completions.create(model="demo", prompt="It was", max_tokens=900, stream=True)
        next(iter(stream))
        closing = threading.Thread(target=place.server.close, args=(0.5,))
        closing.start()
        _until(lambda: place.face.closing)
        assert place.get("/health").status_code == 503
        refused = place.post("/v1/completions", LONG)
        assert refused.status_code == 503
        assert refused.headers["retry-after"].isdecimal()
        with pytest.raises(openai.APIError, match="the server is closing"):
            for _ in stream:
                pass
        closing.join(PATIENCE_S)
        assert not closing.is_alive()


def test_logs_and_metrics_say_how_much_and_never_what(demo: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(demo, parallel=1) as place, caplog.at_level(logging.DEBUG):
        place.post("/v1/completions?secret=secretword", {"prompt": "secretword " * 3, "max_tokens": 2})
        place.post("/v1/completions", {"prompt": "secretword", "secretfield": "secretword"})
        place.get("/a%1b[31mb")
        _until(
            lambda: any(
                "40" in record.getMessage() for record in caplog.records if record.name == "edgekv.serve.access"
            )
        )
        lines = [record.getMessage() for record in caplog.records if record.name == "edgekv.serve.access"]
        assert lines[0].startswith("POST /v1/completions 200, ")
        assert lines[0].endswith(" tokens, 0 cached")
        assert not any(
            "secretword" in record.getMessage() for record in caplog.records if record.name.startswith("edgekv")
        )
        assert not any("\x1b" in line for line in lines)
        metrics = place.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'edgekv_http_responses_total{route="/v1/completions",status="200"} 1' in metrics.text
    assert 'edgekv_tokens_total{kind="generated"} 2' in metrics.text


def test_a_fault_is_500_and_its_message_is_in_no_log(
    demo: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(demo, parallel=1) as place, caplog.at_level(logging.DEBUG):

        def fail(self: Any) -> None:
            raise KeyError("".join(("secret", "word")))  # a traceback quotes its lines

        monkeypatch.setattr(type(place.service), "snapshot", fail)
        answer = place.get("/metrics")
        assert answer.status_code == 500
        assert "secretword" not in answer.text
        _until(lambda: any("please report it" in record.getMessage() for record in caplog.records))
        said = [(record.name, record.getMessage(), record.exc_info) for record in caplog.records]
        assert "secretword" not in repr(said)


def test_a_port_that_is_taken_and_a_host_that_is_elsewhere_are_said_in_one_line() -> None:
    with listen("127.0.0.1", 0) as listener, pytest.raises(UsageError, match="give another --port"):
        listen("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(UsageError, match=r"give another --port|an address of this machine"):
        listen("192.0.2.1", 0)
    with pytest.raises(UsageError, match="an address of this machine"):
        listen("no such host", 0)


def _held(hold: threading.Event) -> Any:
    """Return what stops the service where it tells of an answer, until it is let go."""
    return lambda event: hold.wait(PATIENCE_S)


def _slow_request(place: Place) -> Any:
    from edgekv.runtime.serving.request import Request

    return Request(tuple(place.service.text.encode("It was")), 4)


def _until(true: Any) -> None:
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)
