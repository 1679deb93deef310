"""What a report says of the bundle, the configuration and the text that it is about."""

from __future__ import annotations

import hashlib

from edgekv.bundle import Manifest
from edgekv.runtime.generate import RunOptions

from .lanes import Schedule

Facts = dict[str, str | int | bool | None]


def bundle_facts(manifest: Manifest) -> Facts:
    """Return what was run."""
    return {
        "engine": manifest.engine,
        "form": manifest.form,
        "weights": manifest.weights,
        "page_size": manifest.page_size,
        "architecture": manifest.model.architecture,
        "source_sha256": manifest.source_sha256,
    }


def option_facts(options: RunOptions) -> Facts:
    """Return the configuration."""
    return {
        "kv": options.kv.value,
        "kv_budget": options.kv_budget,
        "policy": options.policy,
        "allow_drop": options.allow_drop,
        "attend": options.attend,
        "offload": options.offload is not None,
    }


def text_facts(text: str, schedule: Schedule) -> dict[str, str | int]:
    """Return which text was read, and how much of it."""
    return {
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": schedule.n_tokens,
        "in_chunks": schedule.prefill,
    }


def shorter_than_asked(schedule: Schedule, wanted: int, available: int) -> list[str]:
    """Return the remark that fewer tokens were read than wanted, if they were."""
    if schedule.n_tokens >= wanted:
        return []
    end = "is no longer" if schedule.n_tokens == available else "is longer than the model's context"
    return [f"{schedule.n_tokens} tokens were read instead of {wanted}: the text {end}"]
