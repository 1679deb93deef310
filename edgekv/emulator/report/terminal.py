"""A result in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from edgekv.sizes import format_bytes

from ..play.result import Result


def to_tables(result: Result) -> list[Table]:
    """Return the tables: the run, its turns, and what happened."""
    return [_facts(result), _turns(result), *([_log(result)] if result.log else [])]


def sentences(result: Result) -> list[str]:
    """Return what to take away, most important first."""
    said, totals = [], result.totals
    limit, peak = result.device["app_limit_bytes"], totals["peak_bytes"]
    if totals["kills"]:
        said.append(f"The app was killed {_times(totals['kills'])}.")
    if totals["errors"]:
        said.append(f"{totals['errors']} of {len(result.turns)} turns ended in an error.")
    if peak > limit:
        said.append(f"The app took {format_bytes(peak)}, and the device grants {format_bytes(limit)}.")
    else:
        said.append(f"Memory peaked at {format_bytes(peak)}, {peak / limit:.0%} of what the device grants.")
    if totals["pages_fetched"]:
        said.append(
            f"{1 - totals['hit_rate']:.0%} of the pages that attention read came from flash,"
            f" {format_bytes(totals['bytes_read'])} in all."
        )
    if totals["speed_left"] < 0.995:
        said.append(f"Heat left {totals['speed_left']:.0%} of the cold speed at the end.")
    return said


def rows(result: Result) -> Iterator[tuple[str, str]]:
    """Return the facts of a run as label and text."""
    device, model, totals = result.device, result.model, result.totals
    yield "device", f"{device['title']}; {format_bytes(device['app_limit_bytes'])} for the app ({device['kill']})"
    yield (
        "model",
        (
            f"{model['architecture']}, {model['n_layers']} layers, {model['weights']} for {model['engine']},"
            f" {format_bytes(model['weights_bytes'])}; context {model['context']}"
        ),
    )
    if result.budget:
        yield (
            "KV budget",
            (
                f"{format_bytes(result.budget['budget_bytes'])}:"
                f" {'the whole context fits' if result.budget['fits'] else 'less than the context, the rest goes to flash'}"
            ),
        )
    yield "time", f"{totals['seconds']:.1f} s, {totals['busy_seconds']:.1f} s of it computing"
    yield (
        "decode",
        (
            f"{totals['decode_tokens_per_s']:.1f} tokens/s; a token takes {totals['decode_p50_s'] * 1e3:.1f} ms,"
            f" 1 of 100 more than {totals['decode_p99_s'] * 1e3:.1f} ms"
        ),
    )
    yield "pages", f"{totals['pages_used']:,} read by attention, {totals['hit_rate']:.1%} of them in memory"
    yield (
        "flash",
        (
            f"{format_bytes(totals['bytes_read'])} read in {totals['flash_reads']:,} requests,"
            f" {format_bytes(totals['bytes_written'])} written in {totals['flash_writes']:,}"
        ),
    )
    yield "wear", f"{format_bytes(totals['bytes_programmed'])} programmed, {totals['wear_share']:.2e} of the endurance"


def _facts(result: Result) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False, title=result.scenario.title, title_justify="left")
    table.add_column(style="dim")
    table.add_column()
    for label, text in rows(result):
        table.add_row(label, text)
    return table


TURN_HEADINGS = ("turn", "at", "prompt", "first token", "answer", "tokens/s", "killed", "error")


def turn_rows(result: Result) -> Iterator[tuple[str, ...]]:
    """Return the turns as texts under :data:`TURN_HEADINGS`."""
    for index, turn in enumerate(result.turns, 1):
        yield (
            str(index),
            f"{turn.began_s:.1f} s",
            f"{turn.prompt_tokens} tokens",
            "none" if turn.ttft_s is None else f"{turn.ttft_s:.2f} s",
            f"{turn.answer_tokens} tokens",
            f"{turn.tokens_per_s:.1f}" if turn.decode_s else "",
            str(turn.kills or ""),
            turn.error or "",
        )


def _turns(result: Result) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in TURN_HEADINGS:
        table.add_column(heading)
    for row in turn_rows(result):
        table.add_row(*row)
    return table


def _log(result: Result) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("at", "event", "what happened"):
        table.add_column(heading)
    for entry in result.log:
        table.add_row(f"{entry['at_s']:.1f} s", entry["kind"], entry["text"])
    return table


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
