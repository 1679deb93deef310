"""The server under a fuzzer that reads its own description: nothing that fits it, or does not, is an error of the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.core.result import Ok

from .conftest import PATIENCE_S, serving


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_request_that_a_fuzzer_thinks_of_is_an_error_of_the_server(demo: Path) -> None:
    with serving(demo, context=64) as place:
        schema = schemathesis.openapi.from_url(f"{place.url}/openapi.json")
        count = 0
        for result in schema.get_all_operations():
            assert isinstance(result, Ok), result
            operation = result.ok()

            @hypothesis.settings(
                max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE))
            def right(case: schemathesis.Case[Any]) -> None:
                nonlocal count
                count += 1
                answer = case.call(base_url=place.url, timeout=PATIENCE_S)
                assert answer.status_code < 500, (answer.status_code, answer.text, case.body)

            @hypothesis.settings(
                max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
            def wrong(case: schemathesis.Case[Any]) -> None:
                nonlocal count
                count += 1
                answer = case.call(base_url=place.url, timeout=PATIENCE_S)
                assert answer.status_code < 500, (answer.status_code, answer.text, case.body)

            for ask in (right, wrong):
                try:
                    ask()
                except hypothesis.errors.Unsatisfiable:
                    continue  # without parameters there is nothing to have wrong
        assert count > 300
        assert place.get("/health").status_code == 200
