"""Many requests on one bundle: each is answered as by a run of its own, whatever runs beside it, is kept, or was lost."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekv.bundle import read_manifest
from edgekv.errors import BudgetError, EdgeKVError, PromptTooLong, SessionMismatch, StoreLocked, TooBusy, UsageError
from edgekv.runtime.generate import Generator
from edgekv.runtime.options import RunOptions
from edgekv.runtime.sampling import SamplingOptions
from edgekv.runtime.serving.request import Event, Failed, Finished, Piece, Reading, Request
from edgekv.runtime.serving.service import Service, ServiceOptions
from edgekv.tiers import KVMode, Together
from tests.cases import seldom

Bundle = Callable[..., Path]
#: Pages of 16 tokens, steps of 32: short prompts have several of both.
RUN = RunOptions(threads=2, prefill_chunk=32, context=512, prefixes=False)


def tokens(count: int, seed: int = 0) -> list[int]:
    numbers: list[int] = np.random.default_rng(seed).integers(5, 1000, count).tolist()
    return numbers


class Asked:
    """A request, and what was told of it."""

    def __init__(self, service: Service, request: Request) -> None:
        self.events: list[Event] = []
        self.tokens: list[int] = []
        self._over = threading.Event()
        self.ticket = service.submit(request, self._told)

    def _told(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Piece):
            self.tokens += [facts.token for facts in event.tokens]
        if isinstance(event, Finished | Failed):
            self._over.set()

    @property
    def end(self) -> Finished:
        assert self._over.wait(120), "no end came"
        last = self.events[-1]
        assert isinstance(last, Finished), last
        return last

    @property
    def error(self) -> EdgeKVError:
        assert self._over.wait(120), "no end came"
        last = self.events[-1]
        assert isinstance(last, Failed), last
        return last.error

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))


def ask(service: Service, prompt: list[int], count: int = 12, **options: Any) -> Asked:
    asked = Asked(service, Request(tuple(prompt), max_tokens=count, **options))
    asked.end  # noqa: B018
    return asked


@contextmanager
def serving(folder: Path, run: RunOptions = RUN, **options: Any) -> Iterator[Service]:
    service = Service(folder, ServiceOptions(run, **options))
    try:
        yield service
    finally:
        service.close()


def settled(service: Service) -> Service:
    """Return a service that has nothing to do any more."""
    deadline = time.monotonic() + 60
    while service._busy() or service._library.waits_s is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return service


def alone(folder: Path, *turns: list[int], count: int = 12, sampling: SamplingOptions | None = None) -> list[int]:
    """Return the answer to the last of some turns, each of which goes on from the answer before."""
    with Generator.open(folder, replace(RUN, kv=KVMode.INT8)) as generator:
        sequence: list[int] = []
        for turn in turns:
            sequence = sequence + turn
            answer = list(generator.tokens(sequence, max_tokens=count, sampling=sampling))
            sequence += answer
        return answer


@pytest.mark.parametrize("together", [Together.ALWAYS, Together.NEVER])
@pytest.mark.parametrize("budget", [None, "600KiB"])
def test_many_at_once_get_what_each_gets_alone(bundle: Bundle, budget: str | None, together: Together) -> None:
    folder = bundle("demo")
    prompts = [tokens(count, count) for count in (3, 40, 100, 33, 260, 64)]
    expected = [alone(folder, prompt) for prompt in prompts]
    with serving(folder, replace(RUN, kv_budget=budget), parallel=3, together=together) as service:
        assert service.writes_together == (together == Together.ALWAYS)
        asked = [Asked(service, Request(tuple(prompt), max_tokens=12)) for prompt in prompts]
        ends = [one.end for one in asked]
        assert [one.tokens for one in asked] == expected
        assert [end.prompt_tokens for end in ends] == list(map(len, prompts))
        deadline = time.monotonic() + 60
        while service.snapshot().requests != {"length": 6}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert service.snapshot().generated_tokens == 6 * 12


@pytest.mark.parametrize(("agree", "pay"), [(True, True), (True, False), (False, True)])
def test_answers_share_a_step_where_that_changes_no_bit_and_saves_time(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, agree: bool, pay: bool
) -> None:
    folder = bundle("demo")
    with Generator.open(folder, RUN) as generator:
        assert generator.rows_agree(3), "rows of fp32 products get the same bits"
    monkeypatch.setattr(Generator, "rows_agree", lambda self, most: agree)
    monkeypatch.setattr(Generator, "rows_pay", lambda self, most: pay)
    with serving(folder, RUN, parallel=3, together=Together.AUTO) as service:
        assert service.writes_together == (agree and pay)


def test_text_ends_where_a_run_ends_it_and_says_why(bundle: Bundle) -> None:
    folder = bundle("demo")
    with serving(folder) as service, Generator.open(folder, replace(RUN, kv=KVMode.INT8)) as generator:
        prompt = service.text.encode("It was a dark night and")
        whole = "".join(generator.stream(prompt, max_tokens=30))
        stop = whole[20:24]
        wanted = "".join(generator.stream(prompt, max_tokens=30, stop=stop))
        stopped = Asked(service, Request(tuple(prompt), max_tokens=30, stop=(stop,)))
        assert (stopped.end.reason, stopped.text) == ("stop", wanted)
        cut = ask(service, prompt, 30)
        assert (cut.end.reason, cut.text) == ("length", whole)
        seeded = SamplingOptions(temperature=1.0, seed=5)
        drawn = ask(service, prompt, 30, sampling=seeded)
        assert drawn.tokens == list(generator.tokens(prompt, max_tokens=30, sampling=seeded))
        assert drawn.end.seed == 5


def test_logits_are_changed_as_was_asked_and_told_as_they_were(bundle: Bundle) -> None:
    with serving(bundle("demo")) as service:
        prompt = tokens(20)
        plain = ask(service, prompt, 4, logprobs=3)
        facts = [token for event in plain.events if isinstance(event, Piece) for token in event.tokens]
        assert [fact.likeliest[0][0] for fact in facts] == plain.tokens, "greedy takes the likeliest"
        assert all(fact.logprob == fact.likeliest[0][1] for fact in facts)
        first = plain.tokens[0]
        banned = ask(service, prompt, 4, logit_bias={first: -100.0}, logprobs=1)
        assert first not in banned.tokens
        told = next(event for event in banned.events if isinstance(event, Piece)).tokens[0]
        assert told.likeliest == facts[0].likeliest[:1], "what the model said, whatever was taken"
        varied = ask(service, prompt, 40, presence_penalty=2.0, frequency_penalty=2.0).tokens
        assert len(set(varied)) > len(set(ask(service, prompt, 40).tokens))


def test_a_turn_goes_on_from_the_answer_before_as_a_session_does(bundle: Bundle, tmp_path: Path) -> None:
    folder = bundle("demo")
    first, second, third = tokens(70, 1), tokens(9, 2), tokens(20, 3)
    other = tokens(100, 4)
    with serving(folder, parallel=1, cache_dir=tmp_path / "cache") as service:
        answer = ask(service, first).tokens
        ask(service, other)  # takes the only place
        turn = ask(service, first + answer + second)
        assert turn.tokens == alone(folder, first, second)
        assert turn.end.cached_tokens == len(first) + 11, "all but the last token of the answer, which was never run"
        third_turn = ask(service, first + answer + second + turn.tokens + third)
        assert third_turn.tokens == alone(folder, first, second, third)
        settled(service)._library.check()


def test_exact_answers_are_those_of_a_run_that_reads_the_whole_prompt(bundle: Bundle, tmp_path: Path) -> None:
    folder = bundle("demo")
    first, second = tokens(70, 1), tokens(9, 2)
    with serving(folder, cache_dir=tmp_path / "cache", exact=True) as service:
        whole = first + ask(service, first).tokens + second
        turn = ask(service, whole)
        assert turn.tokens == alone(folder, whole)
        assert turn.end.cached_tokens == 64, "where a run of its own begins a step"
        assert ask(service, whole[:66] + tokens(30, 9)).end.cached_tokens == 64


def test_what_prompts_have_in_common_is_written_once(bundle: Bundle, tmp_path: Path) -> None:
    folder, common = bundle("demo"), tokens(160)
    with serving(folder, cache_dir=tmp_path / "cache", parallel=2) as service:
        asked = [Asked(service, Request((*common, *tokens(5, seed)), max_tokens=3)) for seed in range(2, 8)]
        cached = [one.end.cached_tokens for one in asked]
        library = settled(service)._library
        library.check()
        per_page = library.spec.n_layers * library.spec.record_bytes
        sealed = library.store.counters.records_written * library.spec.record_bytes // per_page
    assert max(cached) == 160
    assert sealed < 6 * 10, "ten pages each, were they not shared"


def test_answers_are_those_of_a_run_after_a_restart_and_after_damage(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cache = bundle("demo"), tmp_path / "cache"
    first, second = tokens(200, 1), tokens(9, 2)
    with serving(folder, cache_dir=cache) as service:
        answer = ask(service, first).tokens
    expected = alone(folder, first, second)
    assert oct(cache.stat().st_mode)[-3:] == "700"
    with serving(folder, cache_dir=cache) as service:
        turn = ask(service, first + answer + second)
        assert (turn.tokens, turn.end.cached_tokens) == (expected, 211)
    pages = next(cache.glob("*/pages-*.bin"))
    with pages.open("r+b") as stream:
        stream.seek(pages.stat().st_size // 3)
        stream.write(b"\xff" * 20000)
    with serving(folder, cache_dir=cache) as service, caplog.at_level(logging.WARNING):
        turn = ask(service, first + answer + second)
        assert turn.tokens == expected
        assert 0 < turn.end.cached_tokens < 211
        assert "is damaged; the tokens from" in caplog.text
        settled(service)._library.check()
        assert ask(service, first + answer + second).tokens == expected, "what was lost is written anew"
    for index in cache.glob("*/library.sqlite*"):
        index.unlink()
    with serving(folder, cache_dir=cache) as service:
        assert ask(service, first).tokens == answer


_KILLED = """
import sys, threading, time
from pathlib import Path
from edgekv.runtime.options import RunOptions
from edgekv.runtime.serving.request import Finished, Piece, Request
from edgekv.runtime.serving.service import Service, ServiceOptions
run = RunOptions(threads=2, prefill_chunk=32, context=512, prefixes=False)
service = Service(Path(sys.argv[1]), ServiceOptions(run, cache_dir=Path(sys.argv[2])))
answer, over = [], threading.Event()
def told(event):
    if isinstance(event, Piece):
        answer.extend(fact.token for fact in event.tokens)
    if isinstance(event, Finished):
        over.set()
service.submit(Request(tuple(map(int, sys.argv[3].split(","))), max_tokens=12), told)
over.wait()
while service._library.waits_s is not None:
    time.sleep(0.01)
service.submit(Request(tuple(map(int, sys.argv[4].split(","))), max_tokens=200), told)
print(answer[:12], flush=True)
time.sleep(60)
"""


def test_after_a_kill_a_turn_goes_on_from_what_was_durable(bundle: Bundle, tmp_path: Path) -> None:
    folder, cache = bundle("demo"), tmp_path / "cache"
    first, second, other = tokens(200, 1), tokens(9, 2), tokens(180, 3)
    words = [",".join(map(str, prompt)) for prompt in (first, other)]
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, folder, cache, *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    answer = [int(number) for number in line.strip("[]\n").split(",")]
    with serving(folder, cache_dir=cache) as service:
        turn = ask(service, first + answer + second)
        assert turn.tokens == alone(folder, first, second)
        assert turn.end.cached_tokens >= 208, "its sealed pages"
        assert ask(service, other).tokens == alone(folder, other)


def test_the_limit_holds_and_what_was_not_used_for_longest_goes(bundle: Bundle, tmp_path: Path) -> None:
    folder = bundle("demo")
    first, others = tokens(150, 1), [tokens(150, seed) for seed in range(2, 9)]
    with serving(folder, cache_dir=tmp_path / "cache", parallel=1, cache_limit_bytes=1 << 20) as service:
        library = service._library
        answer = ask(service, first).tokens
        for other in others:
            ask(service, other)
            assert ask(service, first).end.cached_tokens == 128, "it is used again and again"
            settled(service)
            library.check()
            assert library.used_bytes <= 1 << 20
        assert ask(service, first).tokens == answer
        assert ask(service, others[0]).end.cached_tokens == 0, "it was not"


def test_without_a_limit_to_keep_anything_in_nothing_stays(bundle: Bundle, tmp_path: Path) -> None:
    folder, cache = bundle("demo"), tmp_path / "cache"
    with serving(folder, cache_dir=cache, cache_limit_bytes=0, parallel=1) as service:
        first = tokens(100, 1)
        answer = ask(service, first).tokens
        assert ask(service, first + answer + tokens(5, 2)).end.cached_tokens == 111, "it is in RAM"
        ask(service, tokens(90, 3))
        assert ask(service, first).end.cached_tokens == 0
    assert not list(tmp_path.rglob("*"))


def test_an_encrypted_cache_tells_nothing_and_takes_one_key(bundle: Bundle, tmp_path: Path) -> None:
    folder, cache, secret = bundle("demo"), tmp_path / "cache", b"0123456789abcdef"
    first = tokens(100, 1)
    with serving(folder, cache_dir=cache, secret=secret) as service:
        answer = ask(service, first).tokens
        assert ask(service, first).end.cached_tokens == 96
    written = b"".join(path.read_bytes() for path in cache.rglob("*") if path.is_file())
    for kind in ("<i4", "<i8", ">u2"):
        assert np.asarray(first[:8], kind).tobytes() not in written
    with serving(folder, cache_dir=cache, secret=secret) as service:
        turn = ask(service, first + answer + [7])
        assert (turn.tokens, turn.end.cached_tokens) == (alone(folder, first, [7]), 111)
    for wrong in (None, b"another secret ..."):
        with pytest.raises(SessionMismatch, match=r"encrypted|not the key"):
            Service(folder, ServiceOptions(RUN, cache_dir=cache, secret=wrong))


def test_owners_share_no_pages(bundle: Bundle, tmp_path: Path) -> None:
    folder, prompt = bundle("demo"), tokens(100)
    with serving(folder, cache_dir=tmp_path / "cache", parallel=2) as service:
        answers = [ask(service, prompt, owner=owner) for owner in (b"a", b"b", b"a", b"b")]
        assert [one.end.cached_tokens for one in answers] == [0, 0, 96, 96]
        assert answers[0].tokens == answers[1].tokens
    with serving(folder, cache_dir=tmp_path / "cache") as service:
        assert ask(service, prompt, owner=b"c").end.cached_tokens == 0
        assert ask(service, prompt, owner=b"b").end.cached_tokens == 96


def test_a_request_that_nobody_waits_for_ends_within_a_step_and_others_go_on(bundle: Bundle) -> None:
    folder = bundle("demo")
    with serving(folder, parallel=2, queue=1) as service:
        came, gone = threading.Event(), Asked.__new__(Asked)
        gone.events, gone.tokens, gone._over = [], [], threading.Event()

        def told(event: Event) -> None:
            Asked._told(gone, event)
            if len(gone.tokens) == 3 and not came.is_set():
                gone.ticket.cancel()
                came.set()

        gone.ticket = service.submit(Request(tuple(tokens(60)), max_tokens=400), told)
        beside = Asked(service, Request(tuple(tokens(50, 2)), max_tokens=30))
        assert gone.end.reason == "cancelled"
        assert len(gone.tokens) == 3
        beside.end  # noqa: B018
        assert beside.tokens == alone(folder, tokens(50, 2), count=30)
        waiting = Asked(service, Request(tuple(tokens(500)), max_tokens=2))
        waiting.ticket.cancel()
        assert waiting.end.reason == "cancelled"
        again = ask(service, tokens(60), 20)
        assert again.tokens == alone(folder, tokens(60), count=20)


def test_a_short_request_waits_for_a_step_of_a_long_prompt_and_not_for_all_of_it(bundle: Bundle) -> None:
    with serving(bundle("demo"), parallel=2) as service:
        order: list[tuple[str, Event]] = []
        over = threading.Semaphore(0)

        def told(name: str) -> Callable[[Event], None]:
            def tell(event: Event) -> None:
                order.append((name, event))
                if isinstance(event, Finished | Failed):
                    over.release()

            return tell

        service.submit(Request(tuple(tokens(480)), max_tokens=4), told("long"))
        service.submit(Request(tuple(tokens(20, 2)), max_tokens=4), told("short"))
        for _ in range(2):
            assert over.acquire(timeout=120)
        first = next(at for at, (name, event) in enumerate(order) if name == "short" and isinstance(event, Piece))
        before = [event for name, event in order[:first] if name == "long" and isinstance(event, Reading)]
        assert len(before) <= 3, "of the 15 steps of the long prompt"


def test_what_cannot_be_is_refused_and_changes_nothing(bundle: Bundle, tmp_path: Path) -> None:
    folder, cache = bundle("demo"), tmp_path / "cache"
    nothing = lambda event: None  # noqa: E731
    with serving(folder, parallel=1, queue=2, cache_dir=cache) as service:
        with pytest.raises(PromptTooLong, match="600 tokens does not fit the context of 512"):
            service.submit(Request(tuple(tokens(600))), nothing)
        with pytest.raises(UsageError, match="a whole number from 0 to 1023"):
            service.submit(Request((1 << 20,)), nothing)
        with pytest.raises(StoreLocked, match="another server has the cache folder"):
            Service(folder, ServiceOptions(RUN, cache_dir=cache))
        asked = [Asked(service, Request(tuple(tokens(200, 1)), max_tokens=5))]
        refused: list[str] = []
        for seed in range(8):
            try:
                asked.append(Asked(service, Request(tuple(tokens(200, seed)), max_tokens=5)))
            except TooBusy as error:
                refused.append(str(error))
        assert refused[0].endswith("requests are waiting already; try again later")
        for one in asked:
            one.end  # noqa: B018
    with pytest.raises(UsageError, match="was closed"):
        service.submit(Request((5,)), nothing)
    with pytest.raises(
        BudgetError, match=r"2 sequences share the budget \(--parallel\), and for one a KV budget of 8.0 KiB"
    ):
        Service(folder, ServiceOptions(replace(RUN, kv_budget="16KiB")))


def test_a_full_disk_costs_what_would_be_kept_and_no_answer(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resource = pytest.importorskip("resource")
    folder, prompt = bundle("demo"), tokens(300)
    expected = alone(folder, prompt)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(folder, cache_dir=tmp_path / "cache") as service, caplog.at_level(logging.WARNING):
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
        try:
            assert ask(service, prompt).tokens == expected
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "is not kept" in caplog.text
        assert ask(service, prompt).tokens == expected
        settled(service)._library.check()


def test_on_a_full_disk_what_was_kept_makes_room_for_what_runs(bundle: Bundle, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    folder, prompts = bundle("demo"), [tokens(400, seed) for seed in range(1, 6)]
    expected = [alone(folder, prompt, count=3) for prompt in prompts]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = replace(RUN, kv_budget="200KiB")
    with serving(folder, run, cache_dir=tmp_path / "cache", parallel=1) as service:
        ask(service, prompts[0], 3)
        size = settled(service)._library.used_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size, limits[1]))
        try:
            for prompt, answer in zip(prompts, expected, strict=True):
                assert ask(service, prompt, 3).tokens == answer
                settled(service)._library.check()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert service._library.used_bytes <= 2 * size
    pages = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("pages-*.bin"))
    assert pages <= 2 * size + 64 * 1024, "with the open page of the last one, which came behind"


def test_what_makes_room_for_the_sequence_before_is_never_what_the_next_one_goes_on_from(
    bundle: Bundle, tmp_path: Path
) -> None:
    folder, first, other = bundle("demo"), tokens(130, 1), tokens(130, 2)  # each leaves 8 pages, and a part of one
    spec = read_manifest(folder).model.pages(16)
    limit = 16 * spec.n_layers * spec.record_bytes
    with serving(folder, cache_dir=tmp_path / "cache", parallel=1, cache_limit_bytes=limit) as service:
        for turn in range(8):
            prompt = (other if turn % 2 else first) + tokens(turn, turn)
            ask(service, prompt, count=4)
            (seat,) = service._seats
            held = seat.keeper._path
            assert all(service._library.owns(record) for node in held for record in node.records), turn


@pytest.mark.parametrize("seed", seldom(range(3), but=[0]))
def test_random_conversations_get_the_answers_of_runs_of_their_own(bundle: Bundle, tmp_path: Path, seed: int) -> None:
    """Turns, branches, restarts, small limits and budgets in any order, against an oracle that knows none of it."""
    folder, cache, choose = bundle("demo"), tmp_path / "cache", random.Random(seed)
    known: dict[tuple[int, ...], list[int]] = {}

    def oracle(prompt: list[int]) -> list[int]:
        if tuple(prompt) not in known:
            known[tuple(prompt)] = alone(folder, prompt, count=6)
        return known[tuple(prompt)]

    heads = [tokens(count, count) for count in (20, 70, 130)]
    said = [list(head) for head in heads]
    for _ in range(3):  # restarts
        limit, budget = choose.choice([1 << 19, 1 << 30, 0]), choose.choice([None, "600KiB", "900KiB"])
        with serving(
            folder, replace(RUN, kv_budget=budget), parallel=choose.choice([1, 2, 3]), cache_dir=cache, exact=True,
            cache_limit_bytes=limit,
        ) as service:  # fmt: skip
            for _ in range(4):
                prompts = []
                for _ in range(choose.choice([1, 2, 4])):
                    base = choose.choice(said)
                    base = base[: choose.randrange(1, len(base) + 1)] if choose.random() < 0.4 else base
                    prompts.append((base + tokens(choose.randrange(1, 40), choose.randrange(4)))[:480])
                asked = [Asked(service, Request(tuple(prompt), max_tokens=6)) for prompt in prompts]
                for prompt, one in zip(prompts, asked, strict=True):
                    one.end  # noqa: B018
                    assert one.tokens == oracle(prompt)
                    said.append(prompt + one.tokens)
                settled(service)._library.check()
                for seat in service._seats:
                    if seat.generator.cache is not None:
                        seat.generator.cache.check()
