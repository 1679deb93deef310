"""The kinds of rounds. Each plays with random options; what differs from an undisturbed run is an AssertionError."""

from __future__ import annotations

import collections
import contextlib
import gc
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekv.errors import BudgetError, EdgeKVError, OutOfPages, StoreFull, StoreLocked, UsageError
from edgekv.runtime.add_prefix import add_prefix
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.sessions.folder import is_session
from edgekv.runtime.sessions.prefixes import list_prefixes, remove_prefix
from edgekv.runtime.sessions.tools import contents, verify
from edgekv.runtime.text import TextStream
from edgekv.tiers import KVMode, PressureMode

from .children import Child, Ended

TEXT = Path(__file__).resolve().parents[2] / "examples" / "long_prompt.txt"
#: Characters of the prompts, and tokens of an answer.
PROMPTS = ((0, 500), (700, 1700), (1500, 1800), (0, 1900))
ANSWER = 80
#: Of the prompts, those with more than a step of prefill: what a prefix must have.
LONG = (1, 3)
SECRET = b"a secret of more than sixteen bytes"
BUDGETS = (None, None, "100%", "70%", "50%", "35%", "25%")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
#: What random options may lead to; anything else fails the round.
REFUSALS = (BudgetError, OutOfPages, StoreFull)


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run says after a prompt; ``whole``: prompt and answer."""

    prompt: list[int]
    answer: list[int]
    text: str

    @property
    def whole(self) -> list[int]:
        return self.prompt + self.answer


class World:
    """Where rounds are played.

    Attributes:
        story: what this round did so far. events: what happened in all of them.
    """

    def __init__(self, folder: Path, bundles: dict[str, Path]) -> None:
        self.folder = folder
        self.bundles = bundles
        self.events: collections.Counter[str] = collections.Counter()
        self.story: list[str] = []
        self.prompts = [TEXT.read_text()[start:stop] for start, stop in PROMPTS]
        self._references: dict[tuple[str, int, str, KVMode], Reference] = {}
        self._began = 0
        self.round = folder
        self.key = folder / "secret.key"
        self.key.write_bytes(SECRET)

    def begin(self, chance: random.Random) -> None:
        """Make a folder for a round."""
        self._began += 1
        self.story = []
        self.round = self.folder / f"round-{self._began}"
        self.round.mkdir()

    def end(self) -> None:
        """Hold the round to what it may leave: nothing."""
        assert not list_prefixes(), "a prefix is left"
        shutil.rmtree(self.round)

    def give_up(self) -> None:
        """Take away what a failed round left, so that the others are judged by themselves."""
        gc.collect()
        with contextlib.suppress(EdgeKVError):
            for prefix in list_prefixes():
                remove_prefix(prefix.path)
        shutil.rmtree(self.round, ignore_errors=True)

    def close(self) -> None:
        """Let go what rounds share."""
        self._references.clear()

    def say(self, line: str) -> None:
        """Note what a round does."""
        self.story.append(f"  {line}")

    def reference(self, bundle: str, prompt: int, attend: str = "exact", kv: KVMode = KVMode.INT8) -> Reference:
        """Return what an undisturbed run says."""
        key = bundle, prompt, attend, kv
        if key not in self._references:
            options = RunOptions(kv=kv, threads=2, attend=attend, prefixes=False, pressure=PressureMode.IGNORE)
            with Generator.open(self.bundles[bundle], options) as generator:
                tokens = generator.text.encode(self.prompts[prompt])
                answer = list(generator.tokens(tokens, max_tokens=ANSWER))
                stream = TextStream(generator.text)
                text = "".join(map(stream.push, answer)) + stream.flush()
            assert len(answer) == ANSWER, "the model ends its answer early: choose another prompt"
            self._references[key] = Reference(tokens, answer, text)
        return self._references[key]

    def options(self, chance: random.Random, bundle: str, **fixed: Any) -> RunOptions:
        """Return random options that make sense together."""
        drops = chance.random() < 0.1 and "session" not in fixed
        split = bundle.endswith("split")
        chosen: dict[str, Any] = {
            "kv": chance.choice((KVMode.INT8, KVMode.INT8, KVMode.AUTO, KVMode.FP16)),
            "kv_budget": chance.choice(BUDGETS),
            "policy": chance.choice(("lru", "heavy", "window", "random")),
            "attend": chance.choice(("exact", "exact", "selective:4", "selective:25%", "selective:0.05"))
            if split
            else "exact",
            "threads": chance.choice((1, 2)),
            "allow_drop": drops,
            "offload": self.round / "offload" if chance.random() < 0.3 and not drops else None,
            "encrypt_offload": chance.random() < 0.3,
            "max_write_per_day": "64MiB" if chance.random() < 0.2 else None,
            "pressure": chance.choice((PressureMode.AUTO, PressureMode.IGNORE)),
            "prefixes": chance.random() < 0.7,
        }
        if "session" in fixed:
            chosen.update(kv=chance.choice((KVMode.INT8, KVMode.AUTO)), offload=None, encrypt_offload=False)
        options = RunOptions(**{**chosen, **fixed})
        self.say(f"{bundle} {options}")
        return options

    def refused(self, error: EdgeKVError) -> None:
        """Count an error that options or pressure may lead to; it is one line."""
        assert "\n" not in str(error), f"an error of several lines: {error}"
        self.say(f"refused: {type(error).__name__}: {error}")
        self.events[f"refused: {type(error).__name__}"] += 1


def pressed(world: World, chance: random.Random, generator: Generator, pieces: Iterator[Any]) -> Iterator[Any]:
    """Pass on what comes, and change the budget now and then between two."""
    often = chance.choice((0.0, 0.0, 0.1, 0.4))
    for piece in pieces:
        yield piece
        if chance.random() >= often or generator.prepared is None:
            continue
        before = generator.prepared.governor.budget_bytes
        try:
            if chance.random() < 0.5:
                generator.set_budget(chance.choice(("100%", "70%", "50%", "35%", "25%", "15%")))
                world.events["set_budget"] += 1
            else:
                generator.on_pressure(chance.choice(("none", "moderate", "critical")))
                world.events["on_pressure"] += 1
        except (UsageError, *REFUSALS) as error:
            world.refused(error)
            after = generator.prepared.governor.budget_bytes
            assert after == before, f"a refused change made the budget {after} instead of {before}"


def comparable(generator: Generator) -> KVMode | None:
    """Return whose text this run must have, after its last token: that of INT8 pages, of fp16, or of no other run."""
    stats = generator.report()
    assert stats.pages is not None
    assert generator.budget is not None
    if stats.pages.pages_dropped:
        return None
    if generator.options.attend != "exact" and stats.reused_tokens and generator.session is None:
        return None  # summaries of pages know how far keys reached in the text that was cut back
    if generator.budget.compress_at_seal or generator.session is not None:
        return KVMode.INT8
    return None if stats.pages.pages_compressed else KVMode.FP16


def check(world: World, generator: Generator, bundle: str, prompt: int, answer: list[int] | str) -> None:
    """Hold an answer to the reference."""
    kv = comparable(generator)
    if generator.cache is not None:
        generator.cache.check()
    if kv is None:
        world.events["not comparable"] += 1
        return
    expected = world.reference(bundle, prompt, generator.options.attend, kv)
    if isinstance(answer, str):
        assert expected.text.startswith(answer), f"{answer!r} instead of {expected.text!r}"
    else:
        assert answer == expected.answer[: len(answer)], f"{answer} instead of {expected.answer}"
    world.events["answers compared"] += 1


def pick(world: World, chance: random.Random) -> tuple[str, int]:
    """Return a bundle and a prompt."""
    return chance.choice(sorted(world.bundles)), chance.randrange(len(world.prompts))


# -- rounds in this process ----------------------------------------------------------------------------------------


def answers(world: World, chance: random.Random) -> None:
    """One to three answers of a generator, to their end, under pressure."""
    bundle, prompt = pick(world, chance)
    with Generator.open(world.bundles[bundle], world.options(chance, bundle)) as generator:
        for _ in range(chance.choice((1, 1, 2, 3))):
            answer_once(world, chance, generator, bundle, prompt)
            prompt = chance.randrange(len(world.prompts))


def answer_once(world: World, chance: random.Random, generator: Generator, bundle: str, prompt: int) -> None:
    """Answer a prompt whole, as text or as tokens."""
    count = chance.randrange(1, ANSWER + 1)
    tokens = generator.text.encode(world.prompts[prompt])
    world.say(f"prompt {prompt}, {count} tokens")
    try:
        if chance.random() < 0.5:
            text = "".join(pressed(world, chance, generator, generator.stream(world.prompts[prompt], max_tokens=count)))
            check(world, generator, bundle, prompt, text)
        else:
            got = list(pressed(world, chance, generator, generator.tokens(tokens, max_tokens=count)))
            assert len(got) == count, f"{len(got)} tokens instead of {count}"
            check(world, generator, bundle, prompt, got)
    except REFUSALS as error:
        world.refused(error)


class _Enough(Exception):
    """What a callback raises that has seen enough."""


def left_early(world: World, chance: random.Random) -> None:
    """Streams that are left half read, in every way there is; then the generator answers again, or is forgotten."""
    bundle, prompt = pick(world, chance)
    generator = Generator.open(world.bundles[bundle], world.options(chance, bundle))
    way = chance.choice(("forgotten", "iterator forgotten", "iterator closed", "circle", "callback", "left", "closed"))
    count = chance.randrange(1, 20)
    world.say(f"{way} after {count} tokens of prompt {prompt}")
    world.events[f"left early: {way}"] += 1

    def enough(done: int, total: int) -> None:
        if way == "callback" and done >= min(total, 200):
            raise _Enough

    stream = generator.stream(world.prompts[prompt], max_tokens=ANSWER, progress=enough)
    got = ""
    with contextlib.suppress(_Enough):
        try:
            for _, piece in zip(range(count), pressed(world, chance, generator, stream), strict=False):
                got += piece
            check(world, generator, bundle, prompt, got)
        except REFUSALS as error:
            world.refused(error)
    if way == "forgotten":
        del generator, stream
        return
    if way == "circle":
        circle: list[object] = [generator, stream]
        circle.append(circle)
        del circle, generator, stream
        gc.collect()
        return
    if way == "closed":
        generator.close()
        return
    if way == "iterator closed":
        stream.close()  # type: ignore[attr-defined]
    if way == "iterator forgotten":
        del stream
    answer_once(world, chance, generator, bundle, chance.randrange(len(world.prompts)))
    if chance.random() < 0.5:
        generator.close()


def session_visits(world: World, chance: random.Random) -> None:
    """A session that is visited until its text is whole; a visit may be forgotten, and no second one is let in meanwhile."""
    bundle, prompt = pick(world, chance)
    engine = bundle.split("-")[0]
    split = bundle.endswith("split")
    attend = chance.choice(("exact", "exact", "selective:4")) if split else "exact"
    expected = world.reference(bundle, prompt, attend)
    path = world.round / "chat.kv"
    secret = SECRET if chance.random() < 0.4 else None
    promised = 0
    failed = 0
    while promised < ANSWER and failed < 20:
        if attend == "exact":
            bundle = chance.choice([name for name in sorted(world.bundles) if name.startswith(engine)])
        session = SessionOptions(path, chance.choice((0, 3, 16, 64)), secret=secret)
        options = world.options(
            chance, bundle, session=session, attend=attend, allow_drop=False, max_write_per_day=None
        )
        generator = Generator.open(world.bundles[bundle], options)
        assert generator.session is not None
        tokens = generator.session.tokens
        assert tokens == expected.whole[: len(tokens)], f"the session holds {tokens} of {expected.whole}"
        held = max(0, len(tokens) - len(expected.prompt))
        assert held >= promised, f"{promised} tokens were saved, {held} are there"
        if chance.random() < 0.3:
            second_is_refused(world, bundle, options)
        count = chance.randrange(1, ANSWER + 1 - held) if held < ANSWER else 0
        world.say(f"holds {len(tokens)} tokens, {count} more")
        got = 0
        if count:
            stream = generator.tokens(tokens if held else expected.prompt, max_tokens=ANSWER - held)
            try:
                pieces = pressed(world, chance, generator, stream)
                for _, token in zip(range(count), pieces, strict=False):
                    assert token == expected.answer[held + got], (
                        f"token {held + got} is {token}, not as in {expected.answer}"
                    )
                    got += 1
            except REFUSALS as error:
                world.refused(error)
                failed += 1
            stream.close()  # type: ignore[attr-defined]
            del stream, pieces
        if chance.random() < 0.3:
            world.events["sessions forgotten"] += 1
            world.say("forgotten")
            promised = held
            del generator
            gc.collect()
        else:
            generator.close()
            promised = held + got
            world.events["sessions closed"] += 1
            kept = contents(path, secret)["tokens"]
            wanted = expected.whole[: len(expected.prompt) + promised] if promised else kept
            assert kept == wanted, f"closed at {len(wanted)} tokens, it holds {len(kept)}"
        problems, _ = verify(path, secret)
        assert not problems, f"verify: {problems}"
    if failed < 20:
        world.events["sessions whole"] += 1


def second_is_refused(world: World, bundle: str, options: RunOptions) -> None:
    """Open a session that is open."""
    try:
        Generator.open(world.bundles[bundle], options)
    except StoreLocked as error:
        world.refused(error)
    else:
        raise AssertionError("a second run was let into an open session")


def prefixes(world: World, chance: random.Random) -> None:
    """A prefix that is added, used and removed."""
    bundle, prompt = pick(world, chance)[0], chance.choice(LONG)
    exact = world.reference(bundle, prompt)
    part = chance.randrange(RunOptions.prefill_chunk, len(exact.prompt))
    path, kept = add_prefix(
        world.bundles[bundle], exact.prompt[:part], RunOptions(threads=chance.choice((1, 2))), name="soak"
    )
    world.say(f"prefix of {kept} tokens")
    world.events["prefixes"] += 1
    options = world.options(chance, bundle, prefixes=True)
    with Generator.open(world.bundles[bundle], options) as generator:
        gone = chance.random() < 0.3
        stream = generator.tokens(exact.prompt, max_tokens=ANSWER)
        try:
            first = next(stream)
            report = generator.report()
            # Pages of a prefix are INT8: a run of fp16 pages says that it did without.
            if options.kv == KVMode.FP16:
                assert not report.reused_tokens
            elif not options.allow_drop:
                assert bool(report.reused_tokens) != bool(report.unused_prefix_tokens)
            if gone:
                remove_prefix(path)  # its pages stay as long as a run has them open
            check(world, generator, bundle, prompt, [first, *pressed(world, chance, generator, stream)])
        except REFUSALS as error:
            world.refused(error)
    for prefix in list_prefixes():
        assert prefix.tokens == kept
        remove_prefix(prefix.path)


def forks(world: World, chance: random.Random) -> None:
    """A generator and its fork, which take turns."""
    bundle, prompt = pick(world, chance)
    first_options, second_options = world.options(chance, bundle), world.options(chance, bundle)
    if first_options.offload is not None:
        second_options = replace(second_options, offload=None)  # one run at a time has such a folder
    with Generator.open(world.bundles[bundle], first_options) as first, first.fork(second_options) as second:
        users = [(first, prompt), (second, chance.randrange(len(world.prompts)))]
        got: list[list[int]] = [[], []]
        streams = [
            pressed(world, chance, user, user.tokens(user.text.encode(world.prompts[p]), max_tokens=ANSWER))
            for user, p in users
        ]
        left = [0, 1]
        while left:
            turn = chance.choice(left)
            try:
                got[turn].append(next(streams[turn]))
            except StopIteration:
                left.remove(turn)
                assert len(got[turn]) == ANSWER
                check(world, users[turn][0], bundle, users[turn][1], got[turn])
            except REFUSALS as error:
                world.refused(error)
                left.remove(turn)


# -- rounds that kill others ---------------------------------------------------------------------------------------


def ended_well(world: World, ended: Ended, sent: signal.Signals | None) -> None:
    """Hold the end of a command to the exit codes that the documents name, and to one line."""
    world.say(f"sent {sent.name if sent else 'nothing'}: {ended}")
    lines = ended.errors.count("\n")
    if ended.code == 0:
        assert not ended.errors, f"it said {ended.errors!r}"
        return
    assert sent is not None, f"exit code {ended.code}: {ended.errors!r}"
    if ended.code == -sent:  # also a process that was not yet edgekv
        assert not ended.errors, f"it said {ended.errors!r}"
        assert sent == signal.SIGKILL or not ended.text, "a signal was not watched"
        return
    assert ended.code == 128 + sent, f"exit code {ended.code} after {sent.name}: {ended.errors!r}"
    assert lines == 1, f"after {sent.name} it said {ended.errors!r}"


def shoot(world: World, chance: random.Random, child: Child, text: str) -> signal.Signals | None:
    """Kill a command at a random moment, of its time or of its text; None: it was faster."""
    number = chance.choice(SIGNALS)
    alive = (
        child.wait(chance.uniform(0, 0.4), 0)
        if chance.random() < 0.4 or not text
        else child.wait(chance.uniform(0, 0.01), chance.randrange(1, len(text)))
    )
    if not alive:
        return None
    child.kill(number)
    world.events[f"kills: {number.name}"] += 1
    return number


def killed_sessions(world: World, chance: random.Random) -> None:
    """Commands on one session that are killed, and go on, until the text is whole."""
    bundle, prompt = pick(world, chance)
    expected = world.reference(bundle, prompt)
    path = world.round / "story.kv"
    encrypted = chance.random() < 0.4
    secret = SECRET if encrypted else None
    for visit in range(6):
        held = 0
        if is_session(path) and any(path.glob("pages-*")):
            tokens = contents(path, secret)["tokens"]
            assert tokens == expected.whole[: len(tokens)], (
                f"after a kill the session holds {tokens} of {expected.whole}"
            )
            problems, usable = verify(path, secret)
            assert not problems, f"verify: {problems}"
            assert usable == len(tokens), f"{usable} of {len(tokens)} tokens can be used"
            held = max(0, len(tokens) - len(expected.prompt))
        if held == ANSWER:
            break
        command = [
            "run", str(world.bundles[bundle]), "--session", str(path), "-q", "-n", str(ANSWER - held),
            "--threads", str(chance.choice((1, 2))), "--checkpoint-every", chance.choice(("1", "8", "64", "0.05s")),
            "--kv-budget", chance.choice(("100%", "90%") if bundle.endswith("inline") else ("100%", "50%", "35%")),
            "--context", "1024",
        ]  # fmt: skip
        command += ["--key-file", str(world.key)] if encrypted else []
        command += ["--continue"] if held else ["--prompt", world.prompts[prompt]]
        child = Child(world.round / "child", command)
        sent = shoot(world, chance, child, expected.text) if visit < 5 else None
        ended_well(world, child.end(), sent)
    tokens = contents(path, secret)["tokens"]
    assert tokens == expected.whole, f"at last the session holds {tokens} instead of {expected.whole}"
    world.events["sessions whole"] += 1


def two_on_one_session(world: World, chance: random.Random) -> None:
    """Two commands on one session at once: one is refused in one line, and the session holds the text."""
    bundle, prompt = pick(world, chance)
    expected = world.reference(bundle, prompt)
    path = world.round / "shared.kv"
    command = [
        "run", str(world.bundles[bundle]), "--session", str(path), "-q", "-n", str(ANSWER), "--threads", "1",
        "--prompt", world.prompts[prompt],
    ]  # fmt: skip
    children = [Child(world.round / f"child-{index}", command) for index in range(2)]
    ends = [child.end() for child in children]
    refused = [ended for ended in ends if ended.code]
    world.say(f"{ends}")
    assert len(refused) < 2, f"both were refused: {ends}"
    for ended in refused:
        assert ended.code == 2, f"exit code {ended.code}: {ended.errors!r}"
        assert ended.errors.count("\n") == 1, f"it said {ended.errors!r}"
        assert ended.errors.startswith("edgekv: "), f"it said {ended.errors!r}"
        assert str(path) in ended.errors, f"it names no session: {ended.errors!r}"
    for ended in ends:
        assert ended in refused or (ended.text.strip() == expected.text.strip() and not ended.errors), f"{ended}"
    world.events["refused: second command on a session" if refused else "two commands one after the other"] += 1
    assert contents(path)["tokens"] == expected.whole
    assert not verify(path)[0]


def killed_prefixes(world: World, chance: random.Random) -> None:
    """Commands that add one prefix at once, some killed; then it is there, whole, and once."""
    bundle, prompt = pick(world, chance)[0], chance.choice(LONG)
    expected = world.reference(bundle, prompt)
    text = world.round / "prefix.txt"
    text.write_text(world.prompts[prompt])
    command = ["prefix", "add", str(world.bundles[bundle]), "--file", str(text), "--threads", "1"]
    children = [Child(world.round / f"child-{index}", command) for index in range(chance.choice((1, 2)))]
    for child in children:
        sent = shoot(world, chance, child, "") if chance.random() < 0.7 else None
        ended_well(world, child.end(), sent)
    whole = add_prefix(world.bundles[bundle], expected.prompt, RunOptions(threads=2))[1]
    found = list_prefixes()
    assert [prefix.tokens for prefix in found] == [whole], f"{found}"
    options = world.options(
        chance, bundle, kv=KVMode.INT8, kv_budget=None, allow_drop=False, attend="exact", prefixes=True
    )
    with Generator.open(world.bundles[bundle], options) as generator:
        check(world, generator, bundle, prompt, list(generator.tokens(expected.prompt, max_tokens=ANSWER)))
        assert generator.report().reused_tokens
    child = Child(world.round / "rm", ["prefix", "rm", "--all"])
    child.kill(signal.SIGKILL) if chance.random() < 0.3 else None
    child.end()
    for prefix in list_prefixes():
        remove_prefix(prefix.path)


def killed_offloads(world: World, chance: random.Random) -> None:
    """Commands that write pages to flash and are killed: nothing is left in their folder, and the next one is right."""
    bundle, prompt = pick(world, chance)
    bundle = bundle.replace("inline", "split")
    expected = world.reference(bundle, prompt)
    folder = world.round / "offload"
    command = [
        "run", str(world.bundles[bundle]), "-q", "-n", str(ANSWER), "--kv", "int8", "--kv-budget", "25%",
        "--prompt", world.prompts[prompt], "--threads", str(chance.choice((1, 2))), "--context", "1024",
    ]  # fmt: skip
    command += ["--offload", str(folder)] if chance.random() < 0.7 else []
    command += ["--encrypt"] if chance.random() < 0.5 else []
    for last in (False, False, True):
        child = Child(world.round / "child", command)
        sent = None if last else shoot(world, chance, child, expected.text)
        ended = child.end()
        ended_well(world, ended, sent)
        assert expected.text.startswith(ended.text.removesuffix("\n")), f"{ended.text!r} instead of {expected.text!r}"
        left = {path.name for path in folder.iterdir()} if folder.exists() else set()
        assert left <= {"wear.jsonl", "lock"}, f"in the offload folder are {left}"
    assert ended.text.strip() == expected.text.strip()


@dataclass(frozen=True)
class Kind:
    """A kind of round, and how often it is played."""

    play: Callable[[World, random.Random], None]
    weight: int


KINDS = {
    "answers": Kind(answers, 4),
    "left early": Kind(left_early, 4),
    "session visits": Kind(session_visits, 3),
    "prefixes": Kind(prefixes, 2),
    "forks": Kind(forks, 2),
    "killed sessions": Kind(killed_sessions, 2),
    "two on one session": Kind(two_on_one_session, 1),
    "killed prefixes": Kind(killed_prefixes, 1),
    "killed offloads": Kind(killed_offloads, 1),
}
