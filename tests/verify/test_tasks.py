"""The retrieval tasks: made from a seed, asked in the model's own words, scored exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgekv.runtime.text import Text
from edgekv.verify.judge import default_text
from edgekv.verify.recall import make_prompts
from edgekv.verify.tasks import FACT, NAMES, QUESTION, WORD, Document, Filler, Question, Suite, make_documents

Bundle = Callable[..., Path]


@pytest.fixture(scope="module")
def demo(bundle: Bundle) -> Text:
    folder = bundle("demo")
    return Text(folder / "tokenizer.json", folder / "chat_template.jinja")


@pytest.fixture(scope="module")
def documents(demo: Text) -> list[Document]:
    filler = Filler(default_text(), lambda sentence: len(demo.encode(sentence)))
    return make_documents(Suite(), filler, seed=3)


def test_the_facts_are_phrased_as_the_bundled_model_learnt_them() -> None:
    pytest.importorskip("torch")
    from tools import demo_tasks

    assert demo_tasks.FACT.strip() == FACT
    assert demo_tasks.QUESTION.removeprefix("Question: ") == QUESTION
    assert demo_tasks.NAMES == NAMES


def test_documents_have_the_length_of_their_cell_and_hold_every_answer(demo: Text, documents: list[Document]) -> None:
    for document in documents:
        for question in document.questions:
            assert question.answer in document.body
        if document.task == "passkey":
            asked_for = int(document.cell.split()[0])
            assert asked_for * 0.9 < len(demo.encode(document.body)) < asked_for * 1.1


def test_a_question_is_not_known_while_its_document_is_read(demo: Text, documents: list[Document]) -> None:
    for document in documents:
        prompts = make_prompts(demo, document)
        for tokens, question in zip(prompts.questions, document.questions, strict=True):
            assert tokens[: len(prompts.document)] == prompts.document
            assert question.text not in demo.decode(prompts.document)
            assert demo.decode(tokens).endswith(f"Question: {question.text}\nAnswer:")


def test_a_chat_model_is_asked_through_its_template(checkpoint: Callable[[str], Path], bundle: Bundle) -> None:
    folder = bundle(checkpoint("llama"))
    text = Text(folder / "tokenizer.json", folder / "chat_template.jinja")
    document = Document("passkey", "", "The code is 1234.", [Question("What is the code?", "1234")])
    prompts = make_prompts(text, document)
    assert text.decode(prompts.document).strip() == "The code is 1234."
    assert prompts.questions[0][0] == text.encode_chat([{"role": "user", "content": "x"}])[0]


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (" The secret code of amber is 1234.", True),
        ("1234", True),
        ("It is 12345.", False),
        ("It is 4321, not 1234.", False),
        ("", False),
    ],
)
def test_the_first_number_must_be_the_answer(said: str, right: bool) -> None:
    assert Question("", "1234").right(said) == right


def test_an_instruction_is_obeyed_when_the_word_is_said() -> None:
    question = Question("", "maple", WORD)
    assert question.right("Maple. It is about whales.")
    assert not question.right("mapleleaf")


def test_equal_seeds_give_equal_documents(demo: Text, documents: list[Document]) -> None:
    filler = Filler(default_text(), lambda sentence: len(demo.encode(sentence)))
    assert make_documents(Suite(), filler, seed=3) == documents
    assert make_documents(Suite(), filler, seed=4) != documents
