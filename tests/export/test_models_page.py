"""docs/models.md says what the pages of model types and the tests' own tables say."""

from __future__ import annotations

from edgekv.model_config import ARCHITECTURES, TEXT_PARTS
from tests.conftest import MODEL_TYPES, VARIANTS
from tests.export.models_page import NAMES, PAGE, render, taken_through
from tests.export.test_parity import MORE


def test_the_page_of_models_is_current_and_knows_every_model_type() -> None:
    assert set(NAMES) == {*ARCHITECTURES, *TEXT_PARTS}
    page = PAGE.read_text(encoding="utf-8")
    assert page == render(page), "run: python -m tests.export.models_page"


def test_every_model_type_is_held_to_transformers_by_a_test() -> None:
    assert {family for family, _ in (VARIANTS | MODEL_TYPES | MORE).values()} == set(ARCHITECTURES)
    assert {kind for kind, _, _ in taken_through()} == {*ARCHITECTURES, *TEXT_PARTS}
