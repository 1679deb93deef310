"""Steps: where prefill is cut, where a sequence can be cut back, and what is computed again how."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgekv.runtime.sessions.steps import Steps

PAGE = 8
TURNS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 30)), min_size=1, max_size=4)


def history(turns: list[tuple[int, int]], chunk: int = 16) -> tuple[Steps, list[int]]:
    """Return the steps of turns, of so many tokens to read and to generate, and where they begin and end."""
    steps, ends = Steps(PAGE), [0]
    for prompt, answer in turns:
        total = ends[-1] + prompt
        while ends[-1] < total:
            stop = steps.next_stop(ends[-1], total, chunk)
            steps.add(ends[-1], stop)
            ends.append(stop)
        for _ in range(answer):
            steps.add(ends[-1], ends[-1] + 1)
            ends.append(ends[-1] + 1)
    return steps, ends


def test_a_prompt_is_cut_at_multiples_of_the_chunk_wherever_it_begins() -> None:
    assert history([(40, 0)])[1] == [0, 16, 32, 40]
    assert history([(10, 2), (30, 0)])[1] == [0, 10, 11, 12, 16, 32, 42]


@given(TURNS)
def test_what_is_stored_of_steps_is_all_of_them(turns: list[tuple[int, int]]) -> None:
    steps, ends = history(turns)
    again = Steps.of_lengths(PAGE, steps.lengths())
    assert (again.end, again.lengths()) == (steps.end, steps.lengths())
    assert len(steps.lengths()) <= 2 * (2 * len(turns) + sum(turn[0] for turn in turns) // 16 + len(turns))
    done = [0]
    while done[-1] < again.end:
        done.append(again.next_stop(done[-1], again.end, 16))
    assert done == ends, "repeating them gives the same ones"


@given(TURNS, st.integers(0, 400))
def test_a_sequence_is_cut_back_to_where_a_step_began_and_the_cache_can_be_cut(
    turns: list[tuple[int, int]], position: int
) -> None:
    steps, ends = history(turns)
    kept = steps.keep(position)
    length = ends[-1]
    fitting = [
        end
        for end in ends
        if end <= position and (end in (0, length) or end % PAGE == 0 or end // PAGE == length // PAGE)
    ]
    assert kept == max(fitting)
    sealed = steps.keep(min(position, length // PAGE * PAGE), -1)
    assert sealed == max(end for end in ends if end <= min(position, length // PAGE * PAGE) and end % PAGE == 0)


@given(TURNS, st.data())
def test_steps_that_are_repeated_stay_and_other_ones_replace_them(
    turns: list[tuple[int, int]], data: st.DataObject
) -> None:
    steps, ends = history(turns)
    at = data.draw(st.integers(0, len(ends) - 2))
    before = steps.lengths()
    steps.add(ends[at], ends[at + 1])
    assert steps.lengths() == before
    steps.add(ends[at], ends[at + 1] + 1)
    assert steps.end == ends[at + 1] + 1
    steps.cut(ends[at])
    assert Steps.of_lengths(PAGE, steps.lengths()).end == steps.end == ends[at]
