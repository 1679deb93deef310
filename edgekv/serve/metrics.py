"""Counters for Prometheus, in its text format. Source: Prometheus, "Exposition formats", version 0.0.4."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from edgekv.runtime.serving.snapshot import Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Counters:
    """What the face has answered since it began."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()  # by route and status
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by route


def line(name: str, kind: str, help: str, samples: Iterable[tuple[dict[str, str], float]]) -> str:
    """Return the lines of one metric; labels are words of ours, so that nothing in them needs an escape."""
    rows = [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        inner = ",".join(f'{key}="{word}"' for key, word in labels.items())
        rows.append(f"{name}{{{inner}}} {value}" if inner else f"{name} {value}")
    return "\n".join(rows) + "\n"


def text(counters: Counters, now: Snapshot) -> str:
    """Return all metrics."""
    states = Counter(sequence.state for sequence in now.sequences)
    tiers = [({"tier": tier.lower()}, size) for tier, size in now.bytes_by_tier.items()]
    flash = [({"direction": "read"}, now.flash_bytes_read), ({"direction": "written"}, now.flash_bytes_written)]
    tokens = [
        ({"kind": "prompt"}, now.prompt_tokens),
        ({"kind": "reused"}, now.reused_tokens),
        ({"kind": "generated"}, now.generated_tokens),
    ]
    answers = [
        ({"route": route, "status": str(status)}, n) for (route, status), n in sorted(counters.responses.items())
    ]
    seconds = [({"route": route}, value) for route, value in sorted(counters.seconds.items())]
    ends = [({"end": end}, n) for end, n in sorted(now.requests.items())]
    sequences = [({"state": state}, states[state]) for state in ("idle", "reading", "writing")]
    return "".join(
        (
            line("edgekv_http_responses_total", "counter", "Responses, by route and status.", answers),
            line("edgekv_http_seconds_total", "counter", "Seconds until the end of the responses.", seconds),
            line("edgekv_requests_total", "counter", "Requests that are over, by how they ended.", ends),
            line(
                "edgekv_tokens_total",
                "counter",
                "Tokens of prompts, those that were in the cache, and of answers.",
                tokens,
            ),
            line("edgekv_waiting", "gauge", "Requests that wait.", [({}, now.waiting)]),
            line("edgekv_sequences", "gauge", "Sequences, by what they do.", sequences),
            line(
                "edgekv_budget_bytes",
                "gauge",
                "RAM that keys and values may use; 0: no limit.",
                [({}, now.budget_bytes)],
            ),
            line("edgekv_pages_bytes", "gauge", "Pages of the sequences, by tier.", tiers),
            line("edgekv_peak_rss_bytes", "gauge", "Memory of the process at the most.", [({}, now.peak_rss_bytes)]),
            line("edgekv_cache_bytes", "gauge", "What requests left on flash.", [({}, now.cache_bytes)]),
            line("edgekv_flash_bytes_total", "counter", "Bytes from and to flash.", flash),
        )
    )
