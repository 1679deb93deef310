"""Conversations in Python: an answer says why it ended and what it cost, at once, piece by piece, or asynchronously."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from edgekv.errors import UsageError
from edgekv.runtime.generate import Generator, RunOptions

Bundle = Callable[..., Path]
ASKED = [{"role": "user", "content": "Who gives pages to programs?"}]
LONG = [{"role": "user", "content": "An operating system gives pages to programs. " * 36}]
SYSTEM = {"role": "system", "content": "An operating system runs programs larger than memory."}


@pytest.fixture
def generator(bundle: Bundle, checkpoint: Callable[[str], Path]) -> Iterator[Generator]:
    with Generator.open(bundle(checkpoint("llama")), RunOptions(context=1000)) as generator:
        yield generator


def test_an_answer_is_the_text_that_a_stream_of_the_rendered_conversation_gives(generator: Generator) -> None:
    answer = generator.chat(ASKED, max_tokens=20)
    prompt = generator.text.encode_chat(ASKED)
    assert answer.text == "".join(generator.stream(prompt, max_tokens=20))
    assert [*prompt, *answer.tokens] == generator.sequence
    assert (answer.finish_reason, answer.usage.prompt_tokens) == ("length", len(prompt))
    assert answer.usage.completion_tokens == len(answer.tokens) == 20
    assert answer.usage.cached_tokens == 0


def test_the_next_turn_says_how_much_of_it_was_in_the_cache(generator: Generator) -> None:
    first = generator.chat(LONG, max_tokens=8)
    again = generator.chat([*LONG, {"role": "assistant", "content": "None."}, *ASKED], max_tokens=8)
    assert first.usage.cached_tokens == 0
    assert 256 <= again.usage.cached_tokens <= first.usage.prompt_tokens < again.usage.prompt_tokens


def test_a_stop_string_ends_an_answer_and_its_tokens_but_not_what_it_cost(generator: Generator) -> None:
    whole = generator.chat(ASKED, max_tokens=20)
    stop = whole.text[len(whole.text) // 2 :][:3]
    answer = generator.chat(ASKED, max_tokens=20, stop=stop)
    assert answer.finish_reason == "stop"
    assert answer.text == whole.text[: whole.text.index(stop)] == generator.text.decode(answer.tokens)
    assert len(answer.tokens) <= answer.usage.completion_tokens < 20


def test_an_answer_comes_in_pieces_and_one_that_is_closed_says_what_came(generator: Generator) -> None:
    whole = generator.chat(ASKED, max_tokens=20)
    stream = generator.chat_stream(ASKED, max_tokens=20)
    assert "".join(stream) == whole.text
    assert stream.answer.tokens == whole.tokens
    cut = generator.chat_stream(ASKED, max_tokens=20)
    begun = next(cut) + next(cut)
    cut.close()
    assert (cut.answer.text, cut.answer.finish_reason) == (begun, None)
    assert whole.text.startswith(begun)
    assert 2 <= cut.answer.usage.completion_tokens < 20
    assert whole.tokens[: len(cut.answer.tokens)] == cut.answer.tokens


def test_an_awaited_answer_is_the_same_and_the_loop_goes_on_meanwhile(generator: Generator) -> None:
    whole = generator.chat(ASKED, max_tokens=60)

    async def talk() -> int:
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                await asyncio.sleep(0)
                beats += 1

        heart = asyncio.create_task(beat())
        answer = await generator.chat_stream(ASKED, max_tokens=60)
        assert (answer.text, answer.tokens, answer.finish_reason) == (whole.text, whole.tokens, "length")
        pieces = [piece async for piece in generator.chat_stream(ASKED, max_tokens=60)]
        assert "".join(pieces) == whole.text
        heart.cancel()
        return beats

    assert asyncio.run(talk()) > 10


def test_who_stops_listening_leaves_the_generator_free_for_the_next_answer(generator: Generator) -> None:
    whole = generator.chat(ASKED, max_tokens=20)

    async def talk() -> None:
        stream = generator.chat_stream(ASKED, max_tokens=400)
        async with aclosing(stream):
            async for _ in stream:
                break
        assert stream.answer.usage.completion_tokens < 400
        assert (await generator.chat_stream(ASKED, max_tokens=20)).text == whole.text
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(generator.chat_stream(ASKED, max_tokens=400), 0.02)
        assert (await generator.chat_stream(ASKED, max_tokens=20)).text == whole.text

    asyncio.run(talk())
    assert generator.chat(ASKED, max_tokens=20).text == whole.text


def test_a_prompt_that_nobody_waits_for_is_not_read_to_its_end(
    bundle: Bundle, checkpoint: Callable[[str], Path]
) -> None:
    read: list[int] = []
    with Generator.open(bundle(checkpoint("llama")), RunOptions(context=1000, prefill_chunk=16)) as generator:

        async def talk() -> None:
            long = [{"role": "user", "content": "pages " * 250}]
            task: asyncio.Task[object]

            def advance(done: int, total: int) -> None:
                read.append(total - done)
                loop.call_soon_threadsafe(task.cancel)

            async def ask() -> object:
                return await generator.chat_stream(long, max_tokens=4, progress=advance)

            loop = asyncio.get_running_loop()
            task = asyncio.create_task(ask())
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(talk())
        assert read[-1] > 0, "some of the prompt was never read"
        assert generator.chat(ASKED, max_tokens=4).usage.completion_tokens == 4


def test_a_pinned_system_message_is_pinned_and_one_that_is_not_there_is_refused(generator: Generator) -> None:
    generator.chat([SYSTEM, *ASKED], max_tokens=4, pin=True)
    cache = generator.report().cache
    assert cache is not None
    assert cache.pinned_pages > 0
    with pytest.raises(UsageError, match="no system message to pin"):
        generator.chat(ASKED, pin=True)


def test_a_conversation_that_cannot_be_rendered_is_refused_before_anything_is_computed(generator: Generator) -> None:
    with pytest.raises(UsageError, match="there is no message"):
        generator.chat_stream([])
    with pytest.raises(UsageError, match="max_tokens must be"):
        generator.chat(ASKED, max_tokens=0)


def test_tools_reach_the_template(bundle: Bundle, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    source = tmp_path / "with-tools"
    shutil.copytree(checkpoint("llama"), source)
    (source / "chat_template.jinja").write_text(
        "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ messages[-1].content }}"
    )
    with Generator.open(bundle(source)) as generator:
        stream = generator.chat_stream(ASKED, tools=[{"type": "function", "function": {"name": "page_table"}}])
        assert generator.text.decode(stream.prompt).startswith("page_table Who")
