"""The retrieval tasks: made from a seed, asked in the model's own words, scored exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgekv.runtime.text import Text
from edgekv.verify.judge import default_text
from edgekv.verify.recall import make_prompts
from edgekv.verify.tasks import DEPTH, WORD, Document, Filler, Question, Suite, make_documents

Bundle = Callable[..., Path]


@pytest.fixture(scope="module")
def demo(bundle: Bundle) -> Text:
    folder = bundle("demo")
    return Text(folder / "tokenizer.json", folder / "chat_template.jinja")


@pytest.fixture(scope="module")
def documents(demo: Text) -> list[Document]:
    filler = Filler(default_text(), lambda sentence: len(demo.encode(sentence)))
    return make_documents(Suite(), filler, seed=3)


def test_documents_have_the_length_of_their_cell_and_hold_every_answer(demo: Text, documents: list[Document]) -> None:
    for document in documents:
        for question in document.questions:
            assert question.answer in f"{document.system} {document.body}"
            if document.task != "key-value recall":
                asked_for = int(question.cell.split()[0])
                assert asked_for * 0.9 < len(demo.encode(document.body)) < asked_for * 1.1


def test_a_fact_stands_at_the_depth_that_its_cell_says(documents: list[Document]) -> None:
    asked = [(d, q) for d in documents for q in d.questions if d.task in ("passkey", "many keys")]
    grid = {(int(q.cell.split()[0]), q.cell.partition(DEPTH)[2]) for _, q in asked}
    assert grid == {(length, f"{depth:.0%}") for length in Suite().lengths for depth in Suite().depths}
    for document, question in asked:
        depth = float(question.cell.partition(DEPTH)[2].rstrip("%")) / 100
        assert document.body.index(question.answer) / len(document.body) == pytest.approx(depth, abs=0.12)


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
    document = Document("passkey", "The code is 1234.", [Question("What is the code?", "1234", "")])
    prompts = make_prompts(text, document)
    assert text.decode(prompts.document).strip() == "The code is 1234."
    assert prompts.questions[0][0] == text.encode_chat([{"role": "user", "content": "x"}])[0]


ORDER = Document("instruction at the start", "Whales.", [Question("What?", "amber", "", WORD)], system="Say amber.")


def test_an_instruction_is_the_system_message_where_the_template_has_one(
    checkpoint: Callable[[str], Path], bundle: Bundle
) -> None:
    folder = bundle(checkpoint("llama"))
    text = Text(folder / "tokenizer.json", folder / "chat_template.jinja")
    asked = [{"role": "system", "content": "Say amber."}, {"role": "user", "content": "Whales.\n\nWhat?"}]
    assert make_prompts(text, ORDER).questions == [text.encode_chat(asked)]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('x') }}{% endif %}<{{ m.content }}>{% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' %}<{{ m.content }}>{% endif %}{% endfor %}",
    ],
    ids=["refused", "left out"],
)
def test_an_instruction_begins_the_message_where_the_template_has_no_system_message(
    template: str, bundle: Bundle, tmp_path: Path
) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_text(template, encoding="utf-8")
    text = Text(bundle("demo") / "tokenizer.json", path)
    [asked] = make_prompts(text, ORDER).questions
    assert text.decode(asked) == "<Say amber.\n\nWhales.\n\nWhat?>"


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
    assert Question("", "1234", "").right(said) == right


def test_an_instruction_is_obeyed_when_the_word_is_said() -> None:
    question = Question("", "maple", "", WORD)
    assert question.right("Maple. It is about whales.")
    assert not question.right("mapleleaf")


def test_equal_seeds_give_equal_documents(demo: Text, documents: list[Document]) -> None:
    filler = Filler(default_text(), lambda sentence: len(demo.encode(sentence)))
    assert make_documents(Suite(), filler, seed=3) == documents
    assert make_documents(Suite(), filler, seed=4) != documents
