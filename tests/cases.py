"""Which cases of a parametrised test run. Imports pytest alone: it is also read where little else is installed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def seldom(cases: Iterable[Any], *, but: Collection[Any], mark: pytest.MarkDecorator = pytest.mark.slow) -> list[Any]:
    """Return the cases of a parametrised test, those with ``mark`` for which one of ``but`` stands in kind in every run.

    Args:
        cases: a tuple is a value for each of several names.
    """
    return [
        pytest.param(*(case if isinstance(case, tuple) else [case]), marks=[] if case in but else mark)
        for case in cases
    ]


def taken(request: pytest.FixtureRequest, test: str, parameter: str) -> list[Any]:
    """Return the values with which this session runs a test: for a fixture that works for all of them at once."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    return [item.callspec.params[parameter] for item in items if item.originalname == test]
