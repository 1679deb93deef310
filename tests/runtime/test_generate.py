"""Generation through the real runtime: the same tokens as transformers, and the same whatever moves underneath."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgekv.errors import BudgetError, CorruptPage, KeysOverflow, PromptTooLong, StoreFull, UsageError
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.sampling import SamplingOptions
from edgekv.runtime.storage.flash import FlashStore
from edgekv.tiers import KVMode, Tier
from tests.cases import seldom
from tests.checkpoints import load_reference
from tests.conftest import ALWAYS, MODEL_TYPES, OFTEN, VARIANTS

Bundle = Callable[..., Path]


def prompt(count: int, vocab: int = 256, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, vocab, count).tolist()
    return tokens


def generate(folder: Path, tokens: list[int], count: int, **options: object) -> list[int]:
    with Generator.open(folder, RunOptions(threads=2, **options)) as generator:  # type: ignore[arg-type]
        return list(generator.tokens(tokens, max_tokens=count))


@pytest.mark.parametrize("form", ["split", "inline"])
@pytest.mark.parametrize(
    "variant",
    [
        *seldom([*ALWAYS, *OFTEN], but=ALWAYS),
        # The others differ in what is exported: test_parity.py takes them through both forms.
        *(
            pytest.param(name, marks=pytest.mark.exhaustive)
            for name in (*VARIANTS, *MODEL_TYPES)
            if name not in (*ALWAYS, *OFTEN)
        ),
    ],
)
def test_logits_and_greedy_tokens_equal_those_of_transformers(
    variant: str, form: str, checkpoint: Callable[[str], Path], bundle: Bundle
) -> None:
    source = checkpoint(variant)
    tokens = prompt(70)
    model = load_reference(source)
    with torch.no_grad():
        inputs = torch.tensor([tokens])
        expected = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=64, do_sample=False, eos_token_id=None
        )[0, len(tokens) :].tolist()
        reference = model(torch.tensor([tokens + expected])).logits[0].numpy()
    for chunk in (128, 17):
        options = RunOptions(threads=2, prefill_chunk=chunk, kv=KVMode.FP16)
        with Generator.open(bundle(source, form), options) as generator:
            generator.manifest.model.__dict__["eos_token_ids"] = ()  # run on, as the reference does
            assert list(generator.tokens(tokens, max_tokens=64)) == expected
        with Generator.open(bundle(source, form), options) as generator:
            assert np.abs(generator.score(tokens + expected) - reference).max() <= 1e-3


@pytest.mark.parametrize("form", ["split", "inline"])
def test_any_budget_gives_the_tokens_of_the_unlimited_int8_run(form: str, bundle: Bundle) -> None:
    folder = bundle("demo", form)
    tokens = prompt(1000, 1000)
    roomy = generate(folder, tokens, 24, kv=KVMode.INT8)
    budgets = ["25%", "40%", "90%"] if form == "split" else ["120%"]
    for budget in budgets:
        assert generate(folder, tokens, 24, kv_budget=budget) == roomy, budget


def test_logits_are_bit_identical_when_pages_come_back_from_flash(bundle: Bundle) -> None:
    folder = bundle("demo")
    tokens = prompt(600, 1000)

    def logits(**options: object) -> np.ndarray:
        with Generator.open(folder, RunOptions(kv=KVMode.INT8, **options)) as generator:  # type: ignore[arg-type]
            rows = generator.score(tokens)
            stats = generator.report()
            assert stats.pages is not None
            assert (stats.pages.pages_fetched > 0) == ("kv_budget" in options)
            return rows

    resident = logits(threads=2, context=600)
    for budget in ("22%", "35%"):
        for threads in (1, 2):
            np.testing.assert_array_equal(logits(threads=threads, kv_budget=budget, context=600), resident)


def test_both_forms_give_the_same_greedy_tokens(bundle: Bundle) -> None:
    tokens = prompt(300, 1000)
    assert generate(bundle("demo", "split"), tokens, 48) == generate(bundle("demo", "inline"), tokens, 48)


def test_a_conversation_only_pays_for_what_is_new(bundle: Bundle) -> None:
    folder, first = bundle("demo"), prompt(200, 1000)
    with Generator.open(folder, RunOptions(context=600, threads=2)) as generator:
        answer = list(generator.tokens(first, max_tokens=20))
        longer = first + answer + prompt(30, 1000, seed=1)
        tokens = list(generator.tokens(longer, max_tokens=20))
        assert generator.report().reused_tokens == len(first) + len(answer) - 1
        generator.cache.check()  # type: ignore[union-attr]
    assert tokens == generate(folder, longer, 20, context=600)


def test_a_changed_history_is_recomputed_from_the_change_on(bundle: Bundle) -> None:
    folder, tokens = bundle("demo"), prompt(200, 1000)
    changed = [*tokens[:100], 7, *tokens[101:]]
    with Generator.open(folder, RunOptions(context=600, kv=KVMode.INT8, threads=2, prefill_chunk=32)) as generator:
        list(generator.tokens(tokens, max_tokens=5))
        result = list(generator.tokens(changed, max_tokens=10))
        assert generator.report().reused_tokens == 96, "back to where the last step before the change began"
        generator.cache.check()  # type: ignore[union-attr]
    assert result == generate(folder, changed, 10, kv=KVMode.INT8, context=600, prefill_chunk=32)


def test_equal_seeds_give_equal_text(bundle: Bundle) -> None:
    def text(seed: int) -> str:
        with Generator.open(bundle("demo")) as generator:
            sampling = SamplingOptions(temperature=0.9, top_p=0.95, seed=seed)
            return "".join(generator.stream("It was a dark night", max_tokens=24, sampling=sampling))

    assert text(3) == text(3) != text(4)


@pytest.mark.parametrize("count", [64, 65])
def test_a_prompt_that_leaves_no_room_in_the_context_is_refused_with_the_numbers(bundle: Bundle, count: int) -> None:
    with (
        Generator.open(bundle("demo"), RunOptions(context=64)) as generator,
        pytest.raises(PromptTooLong, match=rf"{count} tokens .* context of 64"),
    ):
        next(generator.tokens(prompt(count), max_tokens=10))
    assert generator.stats.prefill_tokens == 0


@pytest.mark.parametrize("form", ["split", "inline"])
@pytest.mark.parametrize("session", [False, True])
def test_an_answer_ends_where_the_context_does_and_says_so(
    bundle: Bundle, form: str, session: bool, tmp_path: Path
) -> None:
    kept = SessionOptions(tmp_path / "session") if session else None
    with Generator.open(bundle("demo", form=form), RunOptions(context=64, session=kept)) as generator:
        said = list(generator.tokens(prompt(60), max_tokens=10))
        stats = generator.report()
        assert (len(said), stats.finish_reason, stats.context_full) == (4, "length", True)
        assert said == list(generator.tokens(prompt(60), max_tokens=4))
        assert (stats.finish_reason, stats.context_full) == ("length", False)
        assert len(list(generator.tokens(prompt(63), max_tokens=256))) == 1


def test_the_reason_why_an_answer_ended_is_told(bundle: Bundle) -> None:
    with Generator.open(bundle("demo")) as generator:
        text = "".join(generator.stream("It was a dark night", max_tokens=12))
        assert generator.stats.finish_reason == "length"
        "".join(generator.stream("It was a dark night", max_tokens=12, stop=text.split()[1]))
        assert generator.stats.finish_reason == "stop"
        stream = generator.stream("It was a dark night", max_tokens=12)
        next(stream)
        del stream
        assert generator.stats.finish_reason is None


def test_a_budget_below_one_page_per_layer_says_what_is_needed(bundle: Bundle) -> None:
    with (
        Generator.open(bundle("demo"), RunOptions(kv_budget="8KiB")) as generator,
        pytest.raises(BudgetError, match="in all; raise --kv-budget"),
    ):
        next(generator.tokens(prompt(300), max_tokens=10))


def test_the_inline_form_refuses_a_budget_that_cannot_hold_its_inputs(bundle: Bundle) -> None:
    options = RunOptions(kv_budget="25%", context=1000)
    with (
        Generator.open(bundle("demo", "inline"), options) as generator,
        pytest.raises(BudgetError, match="export with --form split"),
    ):
        next(generator.tokens(prompt(900), max_tokens=10))


def test_a_damaged_record_ends_the_run_and_never_reaches_a_token(bundle: Bundle, tmp_path: Path) -> None:
    options = RunOptions(kv_budget="25%", context=700, kv=KVMode.INT8, offload=tmp_path, threads=2)
    with Generator.open(bundle("demo"), options) as generator:
        stream = generator.tokens(prompt(600, 1000), max_tokens=50)
        next(stream)
        store = generator.cache.manager.store  # type: ignore[union-attr]
        assert isinstance(store, FlashStore)
        cold = generator.cache.table.record[generator.cache.table.tier == Tier.COLD]  # type: ignore[union-attr]
        at = int(cold[0]) * store.spec.record_bytes + 200
        [byte] = os.pread(store.file.handle, 1, at)
        os.pwrite(store.file.handle, bytes([byte ^ 16]), at)
        with pytest.raises(CorruptPage, match="was not used"):
            list(stream)  # not at once: what was read ahead before the damage is still good


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE as a full disk")
def test_a_disk_that_fills_up_stops_the_run_keeps_the_cache_whole_and_lets_it_go_on_later(
    bundle: Bundle, tmp_path: Path
) -> None:
    import resource

    tokens = prompt(550, 1000)
    expected = generate(bundle("demo"), tokens, 20, kv=KVMode.INT8)
    options = RunOptions(kv_budget="25%", context=900, kv=KVMode.INT8, offload=tmp_path, threads=2)
    with Generator.open(bundle("demo"), options) as generator:
        generator.prefill(tokens[:300], max_tokens=0)
        store = generator.cache.manager.store  # type: ignore[union-attr]
        assert isinstance(store, FlashStore)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        # The kernel refuses to let any file grow beyond what the page file has now.
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.fstat(store.file.handle).st_size, limits[1]))
        try:
            with pytest.raises(StoreFull, match="is full; free some space"):
                generator.step(tokens[300:])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert generator.cache is not None
        generator.cache.check()
        kept = len(generator._tokens)
        assert 0 < kept <= 300
        assert set(generator.cache.table.n_slots.tolist()) == {kept}
        assert list(generator.tokens(tokens, max_tokens=20)) == expected


def test_dropping_is_off_unless_allowed_and_reported_when_it_happens(bundle: Bundle, tmp_path: Path) -> None:
    with Generator.open(bundle("demo"), RunOptions(kv_budget="25%", context=600, threads=2)) as generator:
        generator.prefill(prompt(500, 1000), max_tokens=0)
        pages = generator.report().pages
        assert pages is not None
        assert pages.pages_dropped == 0
        assert pages.pages_offloaded > 0


@pytest.mark.parametrize("prompt", [5, np.int64(5), [[1]], [[1, 2], [3, 4]], np.array([[1, 2]]), [[]]])
def test_a_prompt_that_is_no_row_of_tokens_is_refused_and_named(bundle: Bundle, prompt: Any) -> None:
    with Generator.open(bundle("demo"), RunOptions(threads=2)) as generator:
        for call in (
            lambda: list(generator.stream(prompt, max_tokens=1)),
            lambda: list(generator.stream([5], before=prompt, max_tokens=1)),
            lambda: generator.prefill(prompt, max_tokens=1),
            lambda: generator.score(prompt),
        ):
            with pytest.raises(UsageError, match=r"tokens must stand in one row, such as \[1, 2, 3\], not ") as caught:
                call()
            assert str(caught.value).endswith(" ".join(repr(prompt).split()))


def test_progress_may_be_none_and_is_refused_by_name_where_it_cannot_be_called(bundle: Bundle) -> None:
    with Generator.open(bundle("demo"), RunOptions(threads=2)) as generator:
        expected = list(generator.stream([5, 6], max_tokens=3))
        assert list(generator.stream([5, 6], max_tokens=3, progress=None)) == expected
        wrong: Any = 5
        with pytest.raises(UsageError, match=r"progress must be a function .* not 5"):
            list(generator.stream([5, 6], max_tokens=3, progress=wrong))


def test_a_step_of_more_tokens_than_a_step_of_prefill_is_refused_and_adds_nothing(bundle: Bundle) -> None:
    with Generator.open(bundle("demo"), RunOptions(threads=2, prefill_chunk=32)) as generator:
        generator.prefill([1, 2, 3], max_tokens=100)
        with pytest.raises(UsageError, match=r"step\(\) adds 1\.\.32 tokens at a time \(prefill_chunk\), not 33"):
            generator.step([5] * 33)
        assert generator.sequence == [1, 2, 3]
        after = generator.step([5] * 32).copy()
    with Generator.open(bundle("demo"), RunOptions(threads=2, prefill_chunk=32)) as generator:
        generator.prefill([1, 2, 3], max_tokens=100)
        assert np.array_equal(generator.step([5] * 32), after)


def test_score_goes_on_from_what_the_cache_holds_however_long_that_was_made_for(bundle: Bundle) -> None:
    prompt, more = list(range(20, 70)), list(range(80, 140))
    options = RunOptions(threads=2, prefill_chunk=32, kv=KVMode.INT8)
    with Generator.open(bundle("demo"), options) as generator:
        generator.prefill(prompt, max_tokens=200)
        expected = generator.score(more)
    with Generator.open(bundle("demo"), options) as generator:
        generator.prefill(prompt, max_tokens=1)
        assert np.array_equal(generator.score(more), expected)
        assert generator.sequence == prompt + more


def went_back(generator: Generator, given: list[int], kept: int) -> None:
    generator.prefill(given, max_tokens=1)
    generator.go_back(given[:kept])


ENDS: dict[str, Callable[[Generator, list[int]], object]] = {
    "an answer": lambda generator, given: list(generator.tokens(given, max_tokens=8)),
    "a stop string": lambda generator, given: list(generator.stream(given, max_tokens=30, stop="e")),
    "an answer that was left": lambda generator, given: next(generator.tokens(given, max_tokens=8)),
    "a part of a step": lambda generator, given: went_back(generator, given, 350),
    "the first tokens": lambda generator, given: went_back(generator, given, 3),
}


@pytest.mark.parametrize("form", ["split", "inline"])
@pytest.mark.parametrize("end", ENDS)
def test_tokens_are_added_behind_the_whole_sequence_however_it_ended(
    end: str, form: str, bundle: Bundle, tmp_path: Path
) -> None:
    given = prompt(400, 1000)
    options = RunOptions(threads=2, context=600, kv=KVMode.INT8)
    kept = replace(options, session=SessionOptions(tmp_path / "session"))
    with Generator.open(bundle("demo", form), kept) as generator, generator.fork(options) as fresh:
        ENDS[end](generator, given)
        before = generator.sequence
        logits = generator.step([9])
        assert generator.sequence == [*before, 9]
        np.testing.assert_allclose(logits, fresh.prefill([*before, 9], max_tokens=1), atol=0.3)
        generator.save(whole=True)
        assert generator.session is not None
        assert list(generator.session.tokens) == [*before, 9]
        ENDS[end](fresh, given)
        np.testing.assert_allclose(fresh.score([9])[-1], logits, atol=0.3)
        assert fresh.sequence == [*before, 9]


def test_a_cache_that_was_made_for_a_prompt_and_its_answer_says_so_when_it_is_full(bundle: Bundle) -> None:
    with Generator.open(bundle("demo"), RunOptions(threads=2)) as generator:
        generator.prefill(prompt(30), max_tokens=2)
        with pytest.raises(
            PromptTooLong, match="the cache was made for 32 tokens, prompt and answer, and is full; give"
        ):
            list(map(generator.step, [[5]] * 60))
        generator.cache.check()  # type: ignore[union-attr]


@pytest.mark.parametrize("form", ["split", "inline"])
def test_keys_and_values_beyond_fp16_end_the_run_and_are_never_cut_in_silence(
    form: str, checkpoint: Callable[[str], Path], bundle: Bundle, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "scaled"))
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():  # the same function of the tokens, in exact arithmetic
        tensor *= 1e7 if "layers.1.self_attn.v_proj" in name else 1e-7 if "layers.1.self_attn.o_proj" in name else 1
    save_file(weights, folder / "model.safetensors")
    with Generator.open(bundle(folder, form), RunOptions(threads=2)) as generator:
        for tokens in (prompt(40), prompt(1)):
            with pytest.raises(KeysOverflow, match=r"layer 1 has a key or value beyond 65504 at .*token"):
                next(iter(generator.tokens(tokens, max_tokens=4)))
        with pytest.raises(KeysOverflow, match="at token 0,"):
            generator.step([5])
        assert generator.prepared is not None
        assert generator.prepared.cache.use().tokens == 0
