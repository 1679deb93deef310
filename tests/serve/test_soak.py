"""Half a minute of what `python -m tests.soak.serving` does for as long as one likes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.soak.serving import soak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vanish", "kill"), [(False, False), (True, True)], ids=["all stay", "clients and server vanish"]
)
def test_many_clients_of_a_real_server_get_what_runs_of_their_own_give(
    bundle: Callable[..., Path], vanish: bool, kill: bool
) -> None:
    outcome = soak(bundle("demo"), 0.5, vanish=vanish, kill=kill)
    assert outcome.faults == []
    assert outcome.answers["whole"] > 20
