"""The page in docs/ about files shows the tables, the schema and the bytes of the code."""

from __future__ import annotations

from tests.outside.format_page import PAGE, render


def test_the_page_about_files_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == render(page), "run: python -m tests.outside.format_page"
