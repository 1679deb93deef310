"""What selective attention costs in quality, against the obvious ways to save the same RAM: one command, one table.

    python -m benchmarks.quality.selective [--doc docs/flash.md] [--json FILE] [--documents 15] [--page-size 16]

On the bundled model at 4096 tokens, on text that it was not trained on (the last 2 % of four books, `held_out/`):

- `passkey`: answers that are exactly right, about each of the four facts hidden in a document. 60 of 60 prove a true rate above
  95 % (one-sided, 95 % confidence: 0.95 ** 60 < 0.05). A document is read once and asked four times, from the prefix that stays.
- `perplexity` of the last tokens of windows of 4096, as many of each text, decoded one by one after the others were computed
  exactly; its change from `full` over all tokens, with the standard error (paired: the same tokens both ways); and its
  `distance` from `full`: the size of the change for each text, averaged. A cache policy has to give what `full` gives, so a
  lower perplexity is as much an error as a higher one. Text by text, since errors of both kinds cancel over all of them.
- `KL`: how far the predictions of these tokens are from those of `full`, in nats per token, whoever was right.

`selective` keeps what does not fit on flash and attends to its share of the pages; `window` and `random` drop pages to stay
within the same bytes of RAM (summaries and staging of `selective` included). Exits with 1 if a bar is missed: at 25 % passkey
>= 95 % of full and perplexity within 2 % of full, on either side, in change and in distance; at every share, better than
`window` and `random` in passkey, in perplexity, in its distance from full and in KL.

A second table: at 25 %, how often the chosen pages are in RAM, by the policy that names which leave; the text is the same.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgekv.export import export_model
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.sizes import format_bytes
from edgekv.tiers import KVMode
from tools.demo_tasks import RetrievalPrompt, TaskSampler

Double = NDArray[np.float64]

TEXTS = Path(__file__).resolve().parent / "held_out"
SHARES = ("50%", "25%", "12.5%")
FACTS = 4
SEED = 4000


@dataclass(frozen=True)
class Window:
    """Tokens in a row of one text."""

    text: str
    tokens: list[int]


@dataclass
class Row:
    """One line of the table."""

    how: str
    share: str
    budget_bytes: int
    passkey: int
    samples: int
    perplexity: float
    change: float
    change_error: float
    distance: float
    kl: float
    by_text: dict[str, float]
    hit_rate: float | None = None
    fetched_bytes_per_token: float | None = None
    certified_missing: float | None = None


def whole_bytes(generator: Generator, context: int) -> int:
    """Return the RAM in which every page of the context stays, in INT8: what a share is a share of."""
    spec = generator.manifest.model.pages(generator.manifest.page_size)
    pages = -(-context // spec.page_size)
    return (spec.n_layers * pages + 1) // 2 * spec.frame_bytes + (spec.n_layers + 1) * spec.frame_bytes


def answers(generator: Generator, prompts: Sequence[RetrievalPrompt], tokenizer: Tokenizer) -> int:
    """Return how many prompts are answered exactly; what one shares with the one before it is not computed again."""
    right = 0
    for prompt in prompts:
        said = list(generator.tokens(prompt.prompt_ids, max_tokens=len(prompt.answer_ids)))
        right += tokenizer.decode(said).startswith(tokenizer.decode(prompt.answer_ids))
    return right


def predictions(generator: Generator, windows: Sequence[Window], decoded: int) -> Double:
    """Return the log-probabilities [tokens, vocabulary] of the last ``decoded`` tokens of each window, step by step."""
    rows = []
    for window in windows:
        logits = generator.prefill(window.tokens[:-decoded], max_tokens=decoded)
        for token in window.tokens[-decoded:]:
            x = logits.astype(np.float64)
            rows.append(x - x.max() - np.log(np.exp(x - x.max()).sum()))
            logits = generator.step([token])
    return np.stack(rows)


def measure(
    base: Generator, options: RunOptions, how: str, share: str, prompts: Sequence[RetrievalPrompt],
    windows: Sequence[Window], decoded: int, tokenizer: Tokenizer, reference: list[Double],
) -> Row:  # fmt: skip
    """Measure one way at one share; ``reference`` takes the first one's predictions, which others are compared with."""
    with base.fork(options) as generator:
        passkey = answers(generator, prompts, tokenizer)
        said = predictions(generator, windows, decoded)
        stats = generator.report()
        record = generator.manifest.model.pages(generator.manifest.page_size).record_bytes
    if not reference:
        reference.append(said)
    targets = [token for window in windows for token in window.tokens[-decoded:]]
    losses = -said[np.arange(len(targets)), targets]
    change = losses + reference[0][np.arange(len(targets)), targets]
    texts = np.repeat([window.text for window in windows], decoded)
    by_text = {str(text): math.expm1(float(change[texts == text].mean())) for text in dict.fromkeys(texts)}
    row = Row(
        how, share, int(options.kv_budget or 0), passkey, len(prompts),
        perplexity=math.exp(float(losses.mean())),
        change=math.expm1(float(change.mean())),
        change_error=float(change.std()) / math.sqrt(len(change)),
        distance=float(np.mean(np.abs(list(by_text.values())))),
        kl=float((np.exp(reference[0]) * (reference[0] - said)).sum(axis=1).mean()),
        by_text=by_text,
    )  # fmt: skip
    if stats.selection is not None:
        row.hit_rate = stats.selection.hit_rate
        row.fetched_bytes_per_token = stats.selection.fetched_per_step * record
        row.certified_missing = stats.selection.missing_mean.mean
    print(f"  {how} {share}: {json.dumps(asdict(row))}", file=sys.stderr)
    return row


def table(rows: Sequence[Row]) -> str:
    """Print rows as Markdown."""
    lines = [
        "| pages | RAM | how | passkey | perplexity | change | distance | KL | hit rate | fetched per token"
        " | may miss (certified) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.share, format_bytes(row.budget_bytes), row.how, f"{row.passkey}/{row.samples}"]
        cells += [f"{row.perplexity:.3f}", f"{row.change:+.2%} ± {row.change_error:.2%}"]
        cells += [f"{row.distance:.2%}", f"{row.kl:.4f}"]
        cells.append("" if row.hit_rate is None else f"{row.hit_rate:.1%}")
        cells.append("" if row.fetched_bytes_per_token is None else format_bytes(row.fetched_bytes_per_token))
        cells.append("" if row.certified_missing is None else f"{row.certified_missing:.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def policy_table(evictions: dict[str, tuple[float, float]]) -> str:
    """Print what each policy keeps in RAM as Markdown."""
    lines = ["| policy | hit rate | fetched per token |", "|---|---|---|"]
    lines += [f"| {name} | {hits:.1%} | {format_bytes(fetched)} |" for name, (hits, fetched) in evictions.items()]
    return "\n".join(lines)


def missed(rows: Sequence[Row]) -> list[str]:
    """Return the bars that are missed."""
    full, found = rows[0], []
    by = {(row.how, row.share): row for row in rows}
    quarter = by["selective", "25%"]
    if quarter.passkey < 0.95 * full.passkey:
        found.append(f"passkey at 25%: {quarter.passkey}, the bar is 95 % of {full.passkey}")
    if max(abs(quarter.change), quarter.distance) > 0.02:
        found.append(f"perplexity at 25%: {quarter.change:+.2%}, {quarter.distance:.2%} from full, the bar is 2 %")
    for share in SHARES:
        for other in ("window", "random"):
            ours, theirs = by["selective", share], by[other, share]
            if ours.passkey <= theirs.passkey:
                found.append(f"passkey at {share}: {ours.passkey}, {other} has {theirs.passkey}")
            if ours.perplexity >= theirs.perplexity:
                found.append(f"perplexity at {share}: {ours.perplexity:.3f}, {other} has {theirs.perplexity:.3f}")
            if ours.distance >= theirs.distance:
                found.append(f"perplexity at {share}: {ours.distance:.2%} from full, {other} {theirs.distance:.2%}")
            if ours.kl >= theirs.kl:
                found.append(f"KL at {share}: {ours.kl:.4f}, {other} has {theirs.kl:.4f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--documents", type=int, default=15, help="documents with four facts, each of which is asked for"
    )
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=5, help="windows of each text, evenly spaced")
    parser.add_argument("--decoded", type=int, default=128, help="tokens per window whose perplexity counts")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--doc", type=Path, metavar="FILE", help="write the tables into this page, between their markers"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "demo.edgekv"
        export_model("demo", bundle, page_size=options.page_size)
        rows, evictions = run(bundle, options)
    tables = {"selective": table(rows), "policies": policy_table(evictions)}
    print(*tables.values(), sep="\n\n")
    if options.doc:
        page = options.doc.read_text(encoding="utf-8")
        for name, text in tables.items():
            page = re.sub(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", rf"\g<1>{text}\n\2", page, flags=re.DOTALL)
        options.doc.write_text(page, encoding="utf-8")
    if options.json:
        results = {"rows": [asdict(row) for row in rows], "evictions": evictions}
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for bar in missed(rows):
        print(f"missed: {bar}")
    sys.exit(bool(missed(rows)))


def eviction(base: Generator, options: RunOptions, windows: Sequence[Window], decoded: int) -> tuple[float, float]:
    """Return how many of the chosen pages are in RAM, and the bytes fetched per token."""
    with base.fork(options) as generator:
        predictions(generator, windows, decoded)
        chosen = generator.report().selection
        assert chosen is not None
        record = generator.manifest.model.pages(generator.manifest.page_size).record_bytes
        return chosen.hit_rate, chosen.fetched_per_step * record


def run(bundle: Path, options: argparse.Namespace) -> tuple[list[Row], dict[str, tuple[float, float]]]:
    """Measure every way at every share, and every policy at 25 %."""
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    texts = {
        path.stem: list(tokenizer.encode(path.read_text(encoding="utf-8")).ids) for path in sorted(TEXTS.iterdir())
    }
    size, answer = options.context, 32
    prompts = [
        prompt
        for index in range(options.documents)
        for prompt in TaskSampler(tokenizer, list(texts.values()), [], SEED + index).retrieval_prompts(
            size - answer, FACTS
        )
    ]
    windows = [
        Window(name, tokens[start : start + size])
        for name, tokens in texts.items()
        for start in np.linspace(0, len(tokens) - size, options.windows, dtype=int).tolist()
    ]
    plain = RunOptions(kv=KVMode.INT8, context=size, threads=options.threads)
    with Generator.open(bundle, plain) as base:
        whole = whole_bytes(base, size)
        todo = [("full", "100%", replace(plain, kv_budget=whole))]
        for share in SHARES:
            tight = replace(plain, kv_budget=int(whole * float(share[:-1]) / 100))
            todo.append(("selective", share, replace(tight, attend=f"selective:{share}")))
            todo += [(policy, share, replace(tight, policy=policy, allow_drop=True)) for policy in ("window", "random")]
        reference: list[Double] = []
        rows = [
            measure(base, chosen, how, share, prompts, windows, options.decoded, tokenizer, reference)
            for how, share, chosen in todo
        ]
        quarter = replace(plain, kv_budget=whole // 4, attend="selective:25%")
        evictions = {
            policy: eviction(base, replace(quarter, policy=policy), windows[:: options.windows], options.decoded)
            for policy in ("lru", "heavy", "window", "random")
        }
        return rows, evictions


if __name__ == "__main__":
    main()
